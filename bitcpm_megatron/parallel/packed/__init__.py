# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as packed codes and scales: in messages between data-parallel ranks, and in memory."""
