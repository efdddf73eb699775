# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core for all devices, one module per part of megatron-core."""
