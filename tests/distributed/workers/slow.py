# SPDX-License-Identifier: Apache-2.0
"""The training loop, with a delay at chosen moments: ``slow.py DIRECTORY FLAGS OF launch/pretrain.py...``.

``DIRECTORY/plan.json`` names the moments by their number in this process, from 1: ``step`` (an optimizer step is done),
``save`` (rank 0 publishes a checkpoint), and ``write`` (a process writes its file of a checkpoint). A moment lasts for
a number of seconds, or until a file exists in ``DIRECTORY``: ``{"step": {"2": 31}, "save": {"1": "go on"}}``.
``DIRECTORY/moments`` lists the moments that have begun.
"""

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Imports are inside functions because the checkpoint writer's helper process imports this file.


def slowed(function: Callable, name: str, directory: Path) -> Callable:
    """Wraps a function so that it records that it has begun, and waits if the plan says so, before it does its work."""
    waits = json.loads((directory / "plan.json").read_text()).get(name, {})
    calls = []

    def call(*args, **kwargs):
        calls.append(None)
        with (directory / "moments").open("a") as stream:
            stream.write(f"{name} {len(calls)}\n")
        wait = waits.get(str(len(calls)), 0.0)
        if isinstance(wait, str):
            while not (directory / wait).exists():
                time.sleep(0.05)
        else:
            time.sleep(wait)
        return function(*args, **kwargs)

    return call


def train(argv: list[str], directory: Path) -> None:
    """Trains like ``launch/pretrain.py``."""
    from bitcpm_megatron.launch.launcher import presets
    from bitcpm_megatron.training.flags import parse_args
    from bitcpm_megatron.training.initialize import initialize, shutdown, world_size
    from bitcpm_megatron.training.loop import pretrain

    args = parse_args(presets.expand(argv), world_size())
    initialize(args)
    pretrain(args, on_step=slowed(lambda step: None, "step", directory))
    shutdown()


def main() -> int:
    gc.disable()  # as in a command (cli.begin_imports), whose script this is not
    importlib.import_module("bitcpm_megatron.training.initialize")  # patches come before megatron-core
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from bitcpm_megatron import cli
    from bitcpm_megatron.training import checkpoint, loop  # noqa: F401

    gc.freeze()
    gc.enable()
    directory = Path(sys.argv[1])
    checkpoint.publish_checkpoint = slowed(checkpoint.publish_checkpoint, "save", directory)
    write = slowed(FileSystemWriterAsync.write_preloaded_data, "write", directory)
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    return cli.run(lambda: train(sys.argv[2:], directory))


if __name__ == "__main__":
    sys.exit(main())
