# SPDX-License-Identifier: Apache-2.0
"""Floor 6: a small training loop on megatron-core's parts, for a laptop or one GPU. It is no second Megatron-LM."""

from ..patches import upstream_warnings

upstream_warnings.silence()
