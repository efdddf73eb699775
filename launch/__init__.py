# SPDX-License-Identifier: Apache-2.0
"""What you start: scripts that run from a checkout and as ``python -m bitcpm_megatron.launch.<name>``."""
