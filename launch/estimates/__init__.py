# SPDX-License-Identifier: Apache-2.0
"""Estimates of a job based only on its flags: the shapes of the model, its memory, and its quantizer."""
