# SPDX-License-Identifier: Apache-2.0
"""Runs ``$DUMP_SCRIPT`` as pretrain_gpt.py would be, and writes the quantized weights that its first step used.

``$DUMP_TO/rank<N>.pt`` holds module path -> whole quantized weight ``[out, in]``, gate and up apart, for this pipeline
stage. A script for ``launch/pretrain_gpt.py --script``.
"""

import functools
import os
import sys
from pathlib import Path

import torch


def gathered(state, module) -> torch.Tensor:
    """The whole quantized weight of a module."""
    from bitcpm_megatron.parallel.linears import parallel_kind, tensor_parallel_group

    group = tensor_parallel_group(module)
    parts = [torch.empty_like(state.quantized) for _ in range(group.size())]
    torch.distributed.all_gather(parts, state.quantized.contiguous(), group=group)
    if parallel_kind(module) == "row":
        return torch.cat(parts, 1)
    if state.name.endswith("linear_fc1"):
        halves = [p.chunk(2) for p in parts]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return torch.cat(parts, 0)


def dump(original):
    """``train_step`` that writes once what it used."""

    @functools.wraps(original)
    def train_step(forward_step_func, data_iterator, model, *args, **kwargs):
        from bitcpm_megatron.parallel import ternary_modules

        result = original(forward_step_func, data_iterator, model, *args, **kwargs)
        path = Path(os.environ["DUMP_TO"]) / f"rank{torch.distributed.get_rank()}.pt"
        if not path.exists():
            torch.save({s.name: gathered(s, m) for s, m in ternary_modules(model)}, path)
        return result

    return train_step


if __name__ == "__main__":
    import megatron.training.training as loop

    original, replacement = loop.train_step, dump(loop.train_step)
    # MindSpeed-LLM's loop holds it by name.
    for holder in [module for module in sys.modules.values() if vars(module).get("train_step") is original]:
        holder.train_step = replacement
    script = os.environ["DUMP_SCRIPT"]
    exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"))
