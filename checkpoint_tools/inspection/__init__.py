# SPDX-License-Identifier: Apache-2.0
"""Inspection of checkpoints and models: facts, statistics of weights, and findings."""
