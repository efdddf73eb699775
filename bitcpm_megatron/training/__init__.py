# SPDX-License-Identifier: Apache-2.0
"""Floor 5: a small training loop on megatron-core's parts, for a laptop or one GPU. It is no second Megatron-LM."""

import warnings

# What megatron-core says on import where Apex and Transformer Engine are absent, and what torch says of its calls on
# every rank: ../patches/megatron_core.py and megatron-core's local implementations are the answer to the first, and
# nobody here can change the second.
for _message in (
    ".*Apex.*Falling back",
    ".*Transformer Engine.*Falling back",
    ".*is deprecated. Please use .torch.distributed",
    "When using (async grad allreduce|sequence parallelism) it is recommended to set",
):
    warnings.filterwarnings("ignore", message=_message)
