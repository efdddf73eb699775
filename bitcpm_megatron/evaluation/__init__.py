# SPDX-License-Identifier: Apache-2.0
"""Evaluation of models: their scores on benchmarks and texts, and how much of another model's score they retain."""
