# SPDX-License-Identifier: Apache-2.0
"""Pretrains a ternary (or BF16) GPT with megatron-core: ``torchrun ... launch/pretrain.py --ternary ...``.

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 the start-up probe found a mismatch.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron.tensor_parallel import ProbeError, RecipeError
from bitcpm_megatron.tensor_parallel.record import RecordError
from bitcpm_megatron.training.arguments import parse_args
from bitcpm_megatron.training.checkpoint import CheckpointError
from bitcpm_megatron.training.initialize import initialize, shutdown, world_size
from bitcpm_megatron.training.loop import TrainingError, pretrain

_STATUS = {
    ProbeError: 3,
    RecipeError: 2,
    RecordError: 2,
    CheckpointError: 2,
    FileNotFoundError: 2,
    ValueError: 2,
    TrainingError: 1,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one training job in this process; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    args = parse_args(argv, world_size())
    initialize(args)
    try:
        pretrain(args)
    except tuple(_STATUS) as error:
        status = next(s for kind, s in _STATUS.items() if isinstance(error, kind))
        print(f"error: {error}", file=sys.stderr, flush=True)
        return status
    shutdown()
    return 0


# The checkpoint writer starts processes that import this file again: without the guard they would train, and hang.
if __name__ == "__main__":
    sys.exit(main())
