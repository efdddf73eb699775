# SPDX-License-Identifier: Apache-2.0
"""Runs ``$DUMP_SCRIPT`` as pretrain_gpt.py would be, and writes what its first forward pass under MindSpeed rotated by.

``$DUMP_TO/rank<N>.pt`` holds the table of angles ``[sequence, 1, 1, kv_channels]`` that LongRoPE's module gave the
model, the positions ``[sequence, batch]`` at which this rank reads it, and the module that the rotary forward comes
from. A script for ``launch/pretrain_gpt.py --script``.
"""

import os
from pathlib import Path

import torch


def dump(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """A forward hook of all modules; writes once."""
    from mindspeed.utils import get_position_ids

    from bitcpm_megatron.models.customize import LongRotaryEmbedding, RotaryEmbedding

    path = Path(os.environ["DUMP_TO"]) / f"rank{torch.distributed.get_rank()}.pt"
    if isinstance(module, LongRotaryEmbedding) and not path.exists():
        found = {"table": output, "positions": get_position_ids(), "forward": RotaryEmbedding.forward.__module__}
        torch.save(found, path)


if __name__ == "__main__":
    torch.nn.modules.module.register_module_forward_hook(dump)
    script = os.environ["DUMP_SCRIPT"]
    exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"))
