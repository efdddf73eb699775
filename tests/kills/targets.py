# SPDX-License-Identifier: Apache-2.0
"""The writing of a teacher's targets for many samples: published shards are complete, and the writing resumes."""

import sys
from pathlib import Path

from support.launcher import environment
from support.small_model import MODEL

from .commands import CHECKOUT, Command, Files, Line
from .processes import Started
from .subject import PATIENCE, demand


def make_teacher(directory: Path) -> None:
    """Trains the teacher, a run of one step."""
    directory.mkdir(parents=True)
    script = CHECKOUT / "launch" / "pretrain.py"
    argv = [*MODEL, "--train-iters", "1", "--eval-iters", "0", "--save", str(directory / "teacher")]
    started = Started([sys.executable, str(script), *argv], CHECKOUT, directory / "output.txt", environment())
    demand(started.wait(PATIENCE) == 0, "no teacher", started.said)
    (directory / "output.txt").unlink()


class Targets(Command):
    """The command that writes a target store of 16 shards."""

    def __init__(self) -> None:
        data = "--mock-data --vocab-size 300 --train-samples 8192 --seq-length 32 --micro-batch-size 16"
        lines = (
            Line("draws", f"--teacher {{input}}/teacher {data} --output {{out}}/store"),
            Line("top-k", f"--teacher {{input}}/teacher {data} --output {{out}}/store --distill-top-k 8"),
        )
        super().__init__("write_targets", "launch", lines, make_teacher)

    def _check(self, after: Files, said: str) -> list[str]:
        """Checks a store whose shards appear one by one; hidden files may remain after a signal, since the next attempt
        replaces them."""
        whole = self._whole.files
        wrong = [name for name, value in after.items() if value != whole.get(name, value)]
        demand(wrong == [], f"not what an undisturbed run writes: {wrong}", said)
        return [name for name in after if name not in whole and not Path(name).name.startswith(".")]
