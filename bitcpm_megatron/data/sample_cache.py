# SPDX-License-Identifier: Apache-2.0
"""Cache of megatron-core's sample indices on disk: complete or absent, never of other data, and never executable code.

Upstream names the indices by the path of the data, accepts any file of that name, and reads it with
``allow_pickle=True``. Here each set of indices has its own directory, named by a key of everything that it depends on.
The directory is built under a temporary name, gets its final name when it is complete, and is checked before upstream
reads it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ..agreement import together
from ..cli import FailedError
from ..files import DIGESTS, FileError, disk_is_full, find_damage, incomplete, publish, read_digests, write_digests
from ..files.lock import FileLock, LockedError

# How long to wait for another job that may be building the same indices.
_PATIENCE_SECONDS = 300.0


def key_of(parts: Mapping[str, Any]) -> str:
    """Returns the name of the indices that depend on these values and nothing else: a digest of them."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def sample_cache(root: Path, key: str, build: Callable[[Path], None]) -> tuple[Path, str | None]:
    """Returns the directory ``root/key`` with the indices; builds it if it is absent or damaged. Collective.

    `build` writes the indices into the directory that it is given; it is called on rank 0 only.

    Returns:
        The directory, and a line for the log if a damaged one was rebuilt (on rank 0; else None).

    Raises:
        ValueError, FailedError: on every rank alike, if the indices cannot be built, written or read.
    """
    note = None
    with together():
        if torch.distributed.get_rank() == 0:
            try:
                note = _ensure(root, key, build)
            except LockedError as error:
                raise LockedError(f"{root}: another job is building the same sample indices ({error.holder})") from None
            except OSError as error:
                said = f"the sample indices cannot be written to {root} ({error.strerror or error})"
                if disk_is_full(error):
                    raise FailedError(f"{said}: free some space, or choose another --data-cache-path") from None
                raise FileError(f"{said}: choose another --data-cache-path") from None
    with together():
        if torch.distributed.get_rank() != 0 and (mistake := _mistake(root / key, contents=False)):
            raise FileError(
                f"{mistake}, as rank {torch.distributed.get_rank()} sees it: --data-cache-path must lie on a file "
                "system that all nodes share"
            )
    return root / key, note


def _ensure(root: Path, key: str, build: Callable[[Path], None]) -> str | None:
    final, temporary = root / key, incomplete(root / key)
    if _mistake(final) is None:
        return None
    lock = FileLock(root / f".{key}.lock", _PATIENCE_SECONDS)
    try:
        mistake = _mistake(final)
        if mistake is None:
            return None  # another job has built them in the meantime
        _remove(temporary)
        temporary.mkdir()
        try:
            build(temporary)
            write_digests(temporary)
            replaced = final.exists()
            _remove(final)
            publish(temporary, final)
        finally:
            _remove(temporary)
        return f"{mistake}: the sample indices were built again" if replaced else None
    finally:
        lock.release()


def _mistake(directory: Path, contents: bool = True) -> str | None:
    """Returns why indices cannot be used, or None; nothing in them is executed.

    With `contents` their digests are compared; without, only sizes, and whether upstream can read them safely.
    """
    if not directory.is_dir():
        return f"{directory} is not there"
    try:
        recorded = read_digests(directory)
        if recorded is None:
            return f"{directory} has no {DIGESTS}"
        for path in sorted(directory.iterdir()):
            if path.name != DIGESTS and path.name not in recorded:
                return f"{path} does not belong there"
            if path.suffix == ".npy":
                try:
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                except (OSError, ValueError, EOFError, SyntaxError) as error:
                    return f"{path} is no whole array of numbers ({error})"
                if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
                    return f"{path} is no array of whole numbers"
        damage = find_damage(directory, contents=contents)
    except (OSError, FileError) as error:
        return str(error)
    return damage[0] if damage else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
