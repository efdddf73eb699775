# SPDX-License-Identifier: Apache-2.0
"""Pretrains a ternary (or BF16) GPT with megatron-core: ``torchrun ... launch/pretrain.py --ternary ...``.

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 the start-up probe found a mismatch.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: list[str] | None = None) -> int:
    """Runs one training job in this process; returns the exit status."""
    # Imports are not at the top of the file: at each save megatron-core's checkpoint writer starts a helper process
    # that imports this file again, and it would spend seconds on importing megatron.
    from bitcpm_megatron import cli

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    return cli.run(lambda: _train(sys.argv[1:] if argv is None else argv))


def _train(argv: list[str]) -> None:
    from bitcpm_megatron.cli import late_imports

    with late_imports():
        from bitcpm_megatron.launch.launcher import presets
        from bitcpm_megatron.training.flags import parse_args
        from bitcpm_megatron.training.initialize import initialize, shutdown, world_size
        from bitcpm_megatron.training.loop import pretrain

    args = parse_args(presets.expand(argv), world_size())
    initialize(args)
    pretrain(args)
    shutdown()


# Without the guard the helper process of the checkpoint writer would train as well, and hang.
if __name__ == "__main__":
    sys.exit(main())
