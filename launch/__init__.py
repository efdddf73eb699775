# SPDX-License-Identifier: Apache-2.0
"""The package's entry points: scripts that run from a checkout and as ``python -m bitcpm_megatron.launch.<name>``."""
