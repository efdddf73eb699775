# SPDX-License-Identifier: Apache-2.0
"""Layout of checkpoint directories, and their publication: a checkpoint appears completely or not at all.

Layout of ``--save DIR``: ``iter_0000100/`` per checkpoint with the tensors, ``ternary_quantizer.json`` (the quantizer
record) and ``arguments.json``; ``latest_checkpointed_iteration.txt``, the tracker, names the newest. A checkpoint is
written as ``.iter_0000100.incomplete`` and renamed when every rank has finished, then the tracker is replaced: at any
moment :func:`latest` finds a complete checkpoint. That function only looks; :func:`recover`, for the process that holds
the directory's lock, cleans up after a killed run.

A tracker that says ``release`` names the directory ``release/``: only weights, such as the converters write, from which
training starts at iteration 0 (Megatron-LM's convention).
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..files import (
    FileError,
    digest,
    fsync,
    incomplete,
    publish,
    read_digests,
    read_json,
    read_text,
    require_file,
    write_text,
)

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_DIRECTORY = "hf"
"""The folder of a converted checkpoint with its model's original small files: its tokenizer and ``config.json``."""
_ARGUMENTS = "arguments.json"
_METADATA = "metadata.json"
_NUMBER = re.compile(r"[0-9]{1,18}")
_ITERATION = re.compile(r"iter_([0-9]{7,18})")
# The path at which a checkpoint is written before it is published under its final name.
incomplete_directory = incomplete


class CheckpointError(FileError):
    """The exception for a checkpoint, or a directory of checkpoints, that cannot be used as requested."""


def latest(directory: str | Path) -> Path | None:
    """Returns the newest complete checkpoint under ``directory``, or None if there is none; changes nothing there.

    Raises:
        CheckpointError: if the directory is not usable, holds checkpoints and no tracker, or the tracker is damaged or
            names a checkpoint that is not complete; the message names the cure.
    """
    directory = Path(directory)
    name = tracked(directory)
    while name is not None:
        path = directory / name
        # A run may have been killed while it replaced the checkpoint.
        place = path if path.exists() else _aside(path)
        if (place / _METADATA).is_file():
            return place
        # A run that is still active may have published a newer checkpoint and deleted this one.
        before, name = name, tracked(directory)
        if name != before:
            continue
        if any(path.glob("mp_rank_*")):
            raise CheckpointError(
                f"{path} is in Megatron-LM's legacy format: this loop reads torch_dist, which checkpoint_tools/ can "
                "write (to Hugging Face and back)"
            )
        raise CheckpointError(
            f"{directory / TRACKER} names {path}, which is not a complete checkpoint: {tracker_cure(directory)}"
        )
    return None


def content_digest(path: Path, without: Collection[str] = ()) -> str:
    """Returns the digest of a file, of a checkpoint, or of a directory (of its newest checkpoint, if it holds some).

    Args:
        path: the file, checkpoint or directory.
        without: names of files in the directory to leave out.

    Raises:
        FileError: if there is no file to digest.
    """
    import xxhash

    if not path.is_dir():
        require_file(path)
        return str(digest(path)["xxh3_128"])
    place = path if (path / _METADATA).is_file() else latest(path) or path
    files = read_digests(place)
    if files is None:
        files = {p.relative_to(place).as_posix(): digest(p) for p in sorted(place.rglob("*")) if p.is_file()}
    files = {name: entry for name, entry in files.items() if name not in without}
    if not files:
        raise FileError(f"{path}: there is nothing in this directory")
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def tracked(directory: Path) -> str | None:
    """Returns the name of the directory that the tracker names; None if there are neither tracker nor checkpoints.

    Raises:
        CheckpointError: as for :func:`latest`, except that it is not checked whether the checkpoint is complete.
    """
    _check_directory(directory)
    tracker, pending = directory / TRACKER, incomplete(directory / TRACKER)
    if not os.path.lexists(tracker):
        text = read_text(pending).strip() if pending.is_file() else ""
        standing = _standing(directory)
        if os.path.lexists(tracker):
            # The first checkpoint was published just now.
            return tracked(directory)
        if _NUMBER.fullmatch(text) and int(text) in iterations(directory):
            # A run was killed between the two renames that publish its first checkpoint.
            return f"iter_{int(text):07d}"
        if standing:
            raise CheckpointError(f"{directory} holds checkpoints and {TRACKER} is missing: {tracker_cure(directory)}")
        return None
    try:
        text = read_text(tracker).strip()
    except FileError as error:
        raise CheckpointError(f"{error}: {tracker_cure(directory)}") from None
    if text == RELEASE:
        return RELEASE
    if not _NUMBER.fullmatch(text) or int(text) == 0:
        shown = repr(text if len(text) <= 40 else f"{text[:40]}...")
        raise CheckpointError(f"{tracker} holds {shown} and not an iteration number: {tracker_cure(directory)}")
    return f"iter_{int(text):07d}"


def tracker_cure(directory: Path) -> str:
    """Returns advice for a directory whose tracker is of no use."""
    complete = iterations(directory)
    if not complete:
        return f"no complete checkpoint stands there; to start anew choose another directory, or remove {TRACKER}"
    others = f" (complete are {', '.join(map(str, complete))})" if len(complete) > 1 else ""
    return (
        f"to go on from the newest complete checkpoint write {complete[-1]} into {TRACKER}{others}; to start anew "
        "choose another directory"
    )


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """Returns the path of the checkpoint of an iteration."""
    return Path(directory) / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """Returns the iteration of a checkpoint by its name; 0 for a release."""
    found = _ITERATION.search(checkpoint.name)
    return 0 if found is None else int(found[1])


def iterations(directory: str | Path) -> list[int]:
    """Returns the iterations of all complete checkpoints in a directory, in ascending order."""
    standing = _standing(Path(directory))
    return [i for i in standing if (iteration_directory(directory, i) / _METADATA).is_file()]


def check_start(save: str | Path, loaded: Path | None, iteration: int) -> None:
    """Refuses a start that would overwrite checkpoints which this run does not continue.

    Raises:
        CheckpointError: if ``save`` holds checkpoints beyond ``iteration``, and the run starts at iteration 0 or from
            another directory. A step back, to an earlier checkpoint of the same directory by its tracker, is allowed.
    """
    save = Path(save)
    standing = _standing(save)
    if not standing or standing[-1] <= iteration:
        return
    if iteration > 0 and loaded is not None and os.path.samefile(loaded.parent, save):
        return
    start = f"starts at iteration {iteration}" + ("" if loaded is None else f" from {loaded}")
    raise CheckpointError(
        f"{save} holds checkpoints up to iteration {standing[-1]}, and this run {start} and would write over them: go "
        f"on from there with --load {save} (and without --finetune), or choose another --save"
    )


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """Returns the arguments of the run that wrote a checkpoint.

    Raises:
        CheckpointError: if the arguments are missing or damaged.
    """
    path = checkpoint / _ARGUMENTS
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise FileError(f"{path} holds no arguments of a run")
    except FileError as error:
        raise CheckpointError(
            f"{error}: without the arguments of the run that wrote it {checkpoint} cannot be loaded; copy it again, or "
            "take another checkpoint"
        ) from None
    return content


def write_arguments(checkpoint: Path, arguments: Mapping[str, Any]) -> None:
    """Writes the arguments of a run beside the tensors of its checkpoint."""
    write_text(checkpoint / _ARGUMENTS, json.dumps(dict(arguments), indent=1, default=str))


def publish_checkpoint(temporary: Path, final: Path, keep_last_n: int | None) -> None:
    """Makes a complete checkpoint the latest one; an existing one at `final` is replaced.

    Older ones are deleted, so that `keep_last_n` are left including this one; None keeps all.
    """
    # The new tracker is written before anything is renamed, so that later steps cannot fail because of a full disk. If
    # this process is killed between the two renames, a first checkpoint has no tracker, and this file shows that no
    # tracker was lost.
    pending = incomplete(final.parent / TRACKER)
    try:
        pending.write_text(str(iteration_of(final)), encoding="utf-8")
        fsync(pending)
    except OSError:
        pending.unlink(missing_ok=True)
        raise
    # A checkpoint of the same iteration, which the tracker may name, is kept aside until the new one is published.
    aside = _aside(final)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    publish(temporary, final)
    publish(pending, final.parent / TRACKER)
    shutil.rmtree(aside, ignore_errors=True)
    if keep_last_n is not None:
        # Delete only older ones: after a step back there may be newer ones, and none of them is the latest.
        older = sorted(path for path in final.parent.glob("iter_*") if path.name < final.name)
        for path in older[: max(0, len(older) + 1 - keep_last_n)]:
            os.replace(path, _aside(path))
            shutil.rmtree(_aside(path))


def recover(directory: str | Path) -> None:
    """Brings a directory into order after a killed run; only the holder of the directory's lock may call it.

    The checkpoint that the tracker needs gets its name back; other remains of checkpoints that were being written,
    replaced or deleted are removed.
    """
    directory = Path(directory)
    found = latest(directory)
    if found is not None:
        if found.name.endswith(".aside"):
            # The run was killed while it replaced a checkpoint of this iteration by another.
            os.replace(found, directory / found.name.removeprefix(".").removesuffix(".aside"))
        if not (directory / TRACKER).exists():
            write_text(directory / TRACKER, str(iteration_of(found)))
    for pattern in (".iter_*.incomplete", ".iter_*.aside"):
        for leftover in directory.glob(pattern):
            shutil.rmtree(leftover)
    incomplete(directory / TRACKER).unlink(missing_ok=True)


def _check_directory(directory: Path) -> None:
    """Raises if a path is not a readable directory of checkpoints; a path that does not exist is accepted."""
    try:
        is_directory = stat.S_ISDIR(directory.stat().st_mode)
    except FileNotFoundError:
        if directory.is_symlink():
            raise CheckpointError(f"{directory} is a link to nothing: is something not mounted?") from None
        return
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{directory}: {said}: name the directory that holds the checkpoints") from None
    if not is_directory:
        raise CheckpointError(f"{directory} is a file: name the directory that holds the checkpoints")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise CheckpointError(f"{directory} cannot be read: choose another, or ask its owner")
    if (directory / _METADATA).exists() or (directory / ".metadata").exists():
        itself = directory.absolute()
        said = f"{directory} is a checkpoint itself and not the directory that holds it: name {itself.parent}"
        if match := _ITERATION.fullmatch(itself.name):
            said += f", and write {int(match[1])} into {TRACKER} there to load this one"
        raise CheckpointError(said)


def _standing(directory: Path) -> list[int]:
    """Returns the iterations of all checkpoints in a directory, including broken ones and those of other loops."""
    found = [(path, _ITERATION.fullmatch(path.name)) for path in directory.glob("iter_*")]
    return sorted(int(match[1]) for path, match in found if match is not None and any(path.glob("*")))


def _aside(path: Path) -> Path:
    """Returns the path at which a checkpoint is kept while it is replaced or deleted."""
    return path.with_name(f".{path.name}.aside")


def kept_tokenizer(checkpoint: Path) -> Path | None:
    """Returns the directory of the tokenizer that a converted checkpoint contains, or None."""
    kept = checkpoint / HF_DIRECTORY
    return kept if any((kept / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) else None


def check_ends(checkpoint: Path, eod: int, tokenizer: str) -> None:
    """Checks that a tokenizer ends documents with a token that ends texts for the model of a converted checkpoint.

    Args:
        checkpoint: the directory of the checkpoint; one that does not name such tokens is accepted.
        eod: the id of the token that ends a document.
        tokenizer: the path of the tokenizer, for the message.

    Raises:
        CheckpointError: if the tokenizer ends documents with another token.
    """
    path = checkpoint / HF_DIRECTORY / "config.json"
    config = read_json(path) if path.is_file() else {}
    ends = config.get("eos_token_id") if isinstance(config, dict) else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if ends and eod not in ends:
        raise CheckpointError(
            f"{path} says that the model ends texts with token {' or '.join(map(str, ends))}, and the tokenizer "
            f"{tokenizer} ends documents with {eod}: give the model's own"
        )
