# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as 2-bit codes and scales: on their way between data-parallel ranks, and where they stay."""
