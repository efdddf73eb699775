# SPDX-License-Identifier: Apache-2.0
"""Quantization of checkpoints: which weights are quantized, in which groups, and the fusing of the quantizer."""
