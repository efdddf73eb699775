# SPDX-License-Identifier: Apache-2.0
"""Estimates of a job from its flags alone: the shapes of the model, its memory, and its quantizer."""
