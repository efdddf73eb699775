# SPDX-License-Identifier: Apache-2.0
"""Ranks that work through one batch after another: ``serve.py DIRECTORY PID``, as ``support/launcher.py`` starts it.

The batch of number N, from 0, is ``DIRECTORY/N.json``:

    {"worker": "a module of this folder", "directory": "what its main() is given", "port": of its process group}

An empty one is the last. When a rank is through with a batch, ``DIRECTORY/N.rankR`` is there. Ranks whose starter, the
process of that PID, is gone end as well.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import psutil

# More is imported by the workers: the checkpoint writer's helper process imports this file at each save.


def batch(path: Path, starter: int) -> dict:
    """The content of a batch, when it is there; an empty one if there will be none."""
    while not path.exists():
        if not psutil.pid_exists(starter):
            return {}
        time.sleep(0.05)
    return json.loads(path.read_text())


def main(directory: Path, starter: int) -> None:
    from bitcpm_megatron import cli

    # A rank that fails leaves the word to rank 0 for so long, until the agent ends it; here nobody ends it.
    cli._SECONDS_FOR_RANK_0 = 0.0
    # Each batch has a process group of its own, with a new store: the agent's would hold the addresses of the last.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    number = 0
    while content := batch(directory / f"{number}.json", starter):
        os.environ["MASTER_PORT"] = str(content["port"])
        importlib.import_module(content["worker"]).main(Path(content["directory"]))
        (directory / f"{number}.rank{os.environ['RANK']}").touch()
        number += 1


# Without the guard that helper process would serve as well.
if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
