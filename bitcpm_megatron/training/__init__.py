# SPDX-License-Identifier: Apache-2.0
"""Floor 6: a small training loop on megatron-core's parts, for a laptop or one GPU; it is not a second Megatron-LM."""

from ..patches import upstream_warnings

upstream_warnings.silence()
