# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints lie, and how they are published: whole or not at all.

Layout of ``--save DIR``: ``iter_0000100/`` per checkpoint with the tensors, ``ternary_quantizer.json`` (the quantizer
record) and ``arguments.json``; ``latest_checkpointed_iteration.txt``, the tracker, names the newest. A checkpoint is
written as ``.iter_0000100.incomplete`` and renamed when every rank has finished, then the tracker is replaced: at any
moment :func:`latest` finds a complete checkpoint.

A tracker that says ``release`` names the directory ``release/``: weights alone, such as the converters write, from
which training starts at iteration 0 (Megatron-LM's convention).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import FileError, publish, write_text

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_ARGUMENTS = "arguments.json"


class CheckpointError(FileError):
    """A checkpoint that cannot be used as asked."""


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint under ``directory``, or None where there is none.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there.
    """
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if text != RELEASE and not text.isdigit():
        raise CheckpointError(f"{tracker} holds {text!r} and not an iteration number")
    path = Path(directory) / RELEASE if text == RELEASE else iteration_directory(directory, int(text))
    if not path.exists() and _aside(path).exists():
        # Killed while a checkpoint of this iteration was replaced by another. Every rank may try: one succeeds.
        with contextlib.suppress(OSError):
            os.replace(_aside(path), path)
    if not (path / "metadata.json").is_file() and any(path.glob("mp_rank_*")):
        raise CheckpointError(
            f"{path} is in Megatron-LM's legacy format: this loop reads torch_dist, which checkpoint_tools/ can write "
            "(to Hugging Face and back)"
        )
    if not (path / "metadata.json").is_file():
        complete = sorted(p.parent.name for p in Path(directory).glob("iter_*/metadata.json"))
        raise CheckpointError(
            f"{tracker} names {path}, which is not a complete checkpoint: write the number of a complete one into it "
            f"({', '.join(complete) or 'there is none'})"
        )
    return path


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return Path(directory) / f"iter_{iteration:07d}"


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint."""
    return json.loads((checkpoint / _ARGUMENTS).read_text(encoding="utf-8"))


def write_arguments(checkpoint: Path, arguments: Mapping[str, Any]) -> None:
    """Puts the arguments of a run beside the tensors of its checkpoint."""
    write_text(checkpoint / _ARGUMENTS, json.dumps(dict(arguments), indent=1, default=str))


def publish_checkpoint(temporary: Path, final: Path, keep_last_n: int | None) -> None:
    """Makes a complete checkpoint the latest one.

    Args:
        temporary: where it was written.
        final: its :func:`iteration_directory`; one that stands there is replaced.
        keep_last_n: delete older checkpoints, so that this many are left with this one; None keeps all.
    """
    # A checkpoint of the same iteration, which the tracker may name, stands aside until the new one is there.
    aside = _aside(final)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    publish(temporary, final)
    write_text(final.parent / TRACKER, str(int(final.name.removeprefix("iter_"))))
    shutil.rmtree(aside, ignore_errors=True)
    if keep_last_n is not None:
        # Only older ones: after a step back there may be newer ones, and none of them is the latest.
        older = sorted(path for path in final.parent.glob("iter_*") if path.name < final.name)
        for path in older[: max(0, len(older) + 1 - keep_last_n)]:
            os.replace(path, _aside(path))
            shutil.rmtree(_aside(path))


def remove_leftovers(directory: str | Path) -> None:
    """Deletes what killed runs left of checkpoints they wrote, replaced or deleted, but not what the tracker needs."""
    with contextlib.suppress(CheckpointError):
        latest(directory)
    for pattern in (".iter_*.incomplete", ".iter_*.aside"):
        for leftover in Path(directory).glob(pattern):
            shutil.rmtree(leftover)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")
