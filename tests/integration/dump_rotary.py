# SPDX-License-Identifier: Apache-2.0
"""A script for ``launch/pretrain_gpt.py --script`` that writes the rotary angles of a first forward under MindSpeed.

It runs ``$DUMP_SCRIPT`` in place of pretrain_gpt.py. ``$DUMP_TO/rank<N>.pt`` then contains the table of angles
``[sequence, 1, 1, kv_channels]`` that LongRoPE's module gave the model (``kv_channels`` per head), the positions
``[sequence, batch]`` at which rank N reads the table, and the name of the module that defines the rotary forward.
"""

import os
from pathlib import Path

import torch


def dump(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """Writes the angles in the first forward of LongRoPE's module; a forward hook of all modules."""
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
