# SPDX-License-Identifier: Apache-2.0
"""A script for ``launch/pretrain_gpt.py --script`` that writes the quantized weights of a run's first step.

It runs ``$DUMP_SCRIPT`` in place of pretrain_gpt.py. ``$DUMP_TO/rank<N>.pt`` then contains, for the pipeline stage of
rank N, a mapping from module paths to whole quantized weights ``[output features, input features]``, in which all
rows of the gate projection come before those of the up projection.
"""

import os
from pathlib import Path

import torch


def gathered(state, module) -> torch.Tensor:
    """Gathers the whole quantized weight of a module; collective over its tensor-parallel group."""
    from bitcpm_megatron.parallel.linears import parallel_kind, tensor_parallel_group

    group = tensor_parallel_group(module)
    quantized, _ = state.in_use(module.weight)
    parts = [torch.empty_like(quantized) for _ in range(group.size())]
    torch.distributed.all_gather(parts, quantized.contiguous(), group=group)
    if parallel_kind(module) == "row":
        return torch.cat(parts, 1)
    if state.name.endswith("linear_fc1"):
        halves = [p.chunk(2) for p in parts]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return torch.cat(parts, 0)


def dump(chunks) -> None:
    """Writes the weights that the first schedule has used, before the optimizer changes them."""
    from bitcpm_megatron.parallel import ternary_modules

    path = Path(os.environ["DUMP_TO"]) / f"rank{torch.distributed.get_rank()}.pt"
    if not path.exists():
        torch.save({s.name: gathered(s, m) for s, m in ternary_modules(chunks)}, path)


if __name__ == "__main__":
    from bitcpm_megatron.patches.megatron_core.schedules import announce_schedules

    announce_schedules(on_trained=dump)
    script = os.environ["DUMP_SCRIPT"]
    exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"))
