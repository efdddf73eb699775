# SPDX-License-Identifier: Apache-2.0
"""Causal attention within documents: core attention, packed sequences, and context parallelism for megatron-core."""
