# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core, for every device: one module per part of it."""
