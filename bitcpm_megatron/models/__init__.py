# SPDX-License-Identifier: Apache-2.0
"""Floor 1: the MiniCPM4 family on megatron-core."""
