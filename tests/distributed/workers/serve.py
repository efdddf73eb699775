# SPDX-License-Identifier: Apache-2.0
"""A rank that runs one batch after another: ``serve.py DIRECTORY PID``, as ``support/launcher.py`` starts it.

The batch of number N, from 0, is ``DIRECTORY/N.json``:

    {"worker": "a module of this folder", "directory": "the argument of its main()", "port": its process group's port}

An empty batch is the last. When rank R has finished a batch, it creates ``DIRECTORY/N.rankR``. The rank also ends when
its starter, the process PID, does not exist any more.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import psutil

# All other imports are left to the workers, because the checkpoint writer's helper process imports this file at each
# save.


def batch(path: Path, starter: int) -> dict:
    """Waits for a batch and returns its content; returns an empty one if the starter has ended."""
    while not path.exists():
        if not psutil.pid_exists(starter):
            return {}
        time.sleep(0.05)
    return json.loads(path.read_text())


def main(directory: Path, starter: int) -> None:
    # As cli.begin_imports and cli.end_imports do in a command, which this script is not.
    gc.disable()
    from bitcpm_megatron import cli

    for name in ("initialize", "loop"):  # in this order: patches come before megatron-core
        importlib.import_module(f"bitcpm_megatron.training.{name}")
    gc.freeze()
    gc.enable()
    # For this time a failed rank waits for rank 0 to report the error, until the agent ends it. Here nobody ends it.
    cli._SECONDS_FOR_RANK_0 = 0.0
    # Each batch has a process group of its own with a new store: the agent's store would hold the addresses of the
    # preceding batch.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    number = 0
    while content := batch(directory / f"{number}.json", starter):
        os.environ["MASTER_PORT"] = str(content["port"])
        importlib.import_module(content["worker"]).main(Path(content["directory"]))
        (directory / f"{number}.rank{os.environ['RANK']}").touch()
        number += 1


# Without the guard the helper process of the checkpoint writer would serve as well.
if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
