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


def main(argv: list[str] | None = None) -> int:
    """Runs one training job in this process; returns the exit status."""
    # Imported here and not above: at each save megatron-core's checkpoint writer starts a helper process that imports
    # this file again, and would import megatron with it, for seconds.
    from bitcpm_megatron.launch import presets
    from bitcpm_megatron.tensor_parallel import ProbeError
    from bitcpm_megatron.training.arguments import parse_args
    from bitcpm_megatron.training.checkpoint_directory import CheckpointError
    from bitcpm_megatron.training.initialize import initialize, shutdown, world_size
    from bitcpm_megatron.training.loop import TrainingError, pretrain

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        argv = presets.expand(sys.argv[1:] if argv is None else argv)
    except presets.PresetError as error:
        return _failed(error, 2)
    args = parse_args(argv, world_size())
    initialize(args)
    try:
        pretrain(args)
    except TrainingError as error:
        return _failed(error, 1)
    except ProbeError as error:
        return _failed(error, 3)
    except (CheckpointError, ValueError, FileNotFoundError) as error:
        return _failed(error, 2)
    shutdown()
    return 0


def _failed(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return status


# Without the guard that helper process would train as well, and hang.
if __name__ == "__main__":
    sys.exit(main())
