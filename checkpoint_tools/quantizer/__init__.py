# SPDX-License-Identifier: Apache-2.0
"""Which weights are ternary, in which groups, and how their quantizer is fused into them."""
