# SPDX-License-Identifier: Apache-2.0
"""Floor 4: the MiniCPM4 family on megatron-core."""
