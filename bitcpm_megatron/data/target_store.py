# SPDX-License-Identifier: Apache-2.0
"""A target store: what a teacher says of every sample of some data, written once and read by students of any layout.

A directory with ``store.json``, which says what the targets are and of what; shards ``targets-00000.bin`` with a fixed
number of samples each; and ``DIGESTS.json``, which comes last: a store without it is not complete. Whoever writes a
shard makes the whole of it, under another name, so that writers share the shards among themselves and a killed one
leaves whole shards alone.

Samples are numbered through the parts of the data, one behind the other: see :class:`Part`. A shard holds the records
of its samples (:mod:`~.target_records`); then for each of them its end in the shard and its XXH3-64, two uint64; and
last ``b"BITCPMT1"``, their number, and the XXH3-64 of those pairs. Sizes are compared with ``DIGESTS.json`` when a
store is opened, and every record with its digest when it is read: nothing damaged is trained on.
"""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import Field

from ..cli import Number, Whole, bounded
from ..files import (
    DIGESTS,
    FileError,
    Strict,
    find_damage,
    incomplete,
    publish,
    read_digests,
    read_json,
    validated,
    write_text,
)
from .target_records import MAX_DRAWS, MAX_VOCABULARY
from .vocabulary import MAX_TOP_K

DESCRIPTION = "store.json"
SAMPLED = "sampled"
_MAGIC = b"BITCPMT1"
_END = struct.Struct("<8sQQ")
_ENTRY = np.dtype([("end", "<u8"), ("digest", "<u8")])
# A thousand shards, but none so small that files are all there is, and none so large that a kill costs much.
_SHARDS, _LEAST_TOKENS, _MOST_TOKENS = 1024, 2**14, 2**20
_MAX_SHARDS = 2**20
_CURE = f"copy the store again, or delete this file and {DIGESTS} and let write_targets.py go on"


class StoreError(FileError):
    """A target store that is not there, not complete, damaged, or of other samples than those that it is asked for."""


class Part(Strict):
    """Samples in one order: those of one of the datasets of a blend.

    Attributes:
        name: of the data files, for people.
        digest: of the files and of everything that decides which tokens are which sample.
        samples: the first so many are in the store.
    """

    name: str
    digest: str
    samples: Annotated[int, bounded(Whole(1, 2**48))]


class Description(Strict):
    """What a store holds, and of what.

    Attributes:
        kind: of the targets.
        width: draws of each token, or the k of top-k.
        temperature: at which the teacher's softmax was taken.
        vocab_size: ids that it was taken over.
        seq_length: tokens of a sample.
        seed: of the draws, with the number of a sample.
        samples_per_shard: the last shard may have fewer.
        teacher: its checkpoint's name, and a digest of the contents.
        tokenizer: what tells it from others.
        data: the arguments that shaped the samples, for people: digests of the parts decide.
        parts: of the data.
    """

    version: Literal[1] = 1
    kind: Literal["sampled", "top-k"]
    width: Annotated[int, bounded(Whole(1, MAX_TOP_K))]
    temperature: Annotated[float, bounded(Number(0, open_minimum=True))]
    vocab_size: Annotated[int, bounded(Whole(1, MAX_VOCABULARY))]
    seq_length: Annotated[int, bounded(Whole(1, 2**24))]
    seed: Annotated[int, bounded(Whole(0, 2**32 - 1))]
    samples_per_shard: Annotated[int, bounded(Whole(1, 2**20))]
    teacher: dict[str, str]
    tokenizer: dict[str, Any]
    data: dict[str, Any]
    parts: Annotated[list[Part], Field(min_length=1)]

    @property
    def samples(self) -> int:
        """Of all parts."""
        return sum(part.samples for part in self.parts)

    @property
    def shards(self) -> list[range]:
        """The numbers of the samples of each shard."""
        size = self.samples_per_shard
        return [range(begin, min(begin + size, self.samples)) for begin in range(0, self.samples, size)]

    def about(self) -> str:
        """For people: ``50 draws of 73,448 ids at a temperature of 1``."""
        what = f"{self.width} draws" if self.kind == SAMPLED else f"the {self.width} likeliest"
        return f"{what} of {self.vocab_size:,} ids at a temperature of {self.temperature:g}"


def samples_per_shard(samples: int, seq_length: int) -> int:
    """Samples in a shard of a store with so many."""
    tokens = min(max(samples * seq_length // _SHARDS, _LEAST_TOKENS), _MOST_TOKENS)
    return max(tokens // seq_length, 1)


def shard_path(directory: Path, shard: int) -> Path:
    """Where a shard lies."""
    return directory / f"targets-{shard:05d}.bin"


def read_description(directory: Path) -> Description:
    """What a store, or one that is being written, says of itself.

    Raises:
        StoreError: it is no store, or its description is damaged.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise StoreError(f"{directory} is no target store: it has no {DESCRIPTION}")
    try:
        found = validated(Description, read_json(path), str(path))
    except FileError as error:
        raise StoreError(str(error)) from None
    if found.samples // found.samples_per_shard > _MAX_SHARDS:
        raise StoreError(f"{path}: {found.samples:,} samples in shards of {found.samples_per_shard} cannot be")
    if found.kind == SAMPLED and found.width > MAX_DRAWS:
        raise StoreError(f"{path}: {found.width} draws are more than {MAX_DRAWS}")
    return found


def begin(directory: Path, description: Description) -> None:
    """Makes a directory a store that is to be filled; one that is such a store already stays as it is.

    Raises:
        StoreError: there is another store, or something else.
    """
    wanted = description.model_dump()
    if (directory / DESCRIPTION).is_file():
        found = read_description(directory).model_dump()
        other = [f"{name} {found[name]} (now {wanted[name]})" for name in wanted if found[name] != wanted[name]]
        if other:
            raise StoreError(f"{directory} holds targets with {', '.join(other)}: choose another --output")
        return
    if directory.is_dir() and any(directory.iterdir()):
        raise StoreError(f"{directory} is not empty, and no target store: choose another --output")
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / DESCRIPTION, json.dumps(wanted, indent=1, sort_keys=True) + "\n")


def write_shard(path: Path, records: Sequence[bytes]) -> None:
    """Writes a whole shard; after an error or a kill there is none.

    Raises:
        OSError: it cannot be written.
    """
    entries = np.zeros(len(records), _ENTRY)
    entries["end"] = np.cumsum([len(record) for record in records])
    entries["digest"] = [xxhash.xxh3_64_intdigest(record) for record in records]
    table = entries.tobytes()
    temporary = incomplete(path)
    try:
        with temporary.open("wb") as stream:
            for record in records:
                stream.write(record)
            stream.write(table + _END.pack(_MAGIC, len(records), xxhash.xxh3_64_intdigest(table)))
        publish(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = os.fspath(path)  # of a full disk it says no more than that
        raise


class TargetStore:
    """A complete store, to be read. It may be handed to other processes.

    Args:
        directory: of the store.

    Attributes:
        description: what it holds.
        digest: of its contents.

    Raises:
        StoreError: it is no store, not complete, or a file lacks, was cut, or is not what was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.description = directory, read_description(directory)
        try:
            recorded = read_digests(directory)
            damage = [*(find_damage(directory, contents=False) or []), *(find_damage(directory, [DESCRIPTION]) or [])]
        except FileError as error:
            raise StoreError(str(error)) from None
        if recorded is None:
            raise StoreError(
                f"{directory} is not complete ({missing(directory, self.description)} shards are missing): start the "
                "write_targets.py that writes it again, and it goes on"
            )
        shards = {shard_path(directory, number).name for number in range(len(self.description.shards))}
        damage += [f"{directory / name} is not in {DIGESTS}" for name in sorted({DESCRIPTION, *shards} - {*recorded})]
        if damage:
            raise StoreError(damage[0])
        self.digest = xxhash.xxh3_128_hexdigest(json.dumps(recorded, sort_keys=True).encode())
        self._tables: dict[int, np.ndarray] = {}

    def record(self, number: int) -> bytes:
        """The record of a sample, as it was written.

        Raises:
            StoreError: it is not, or cannot be read.
        """
        shard, place = divmod(number, self.description.samples_per_shard)
        path = shard_path(self.directory, shard)
        try:
            with path.open("rb") as stream:
                if shard not in self._tables:
                    self._tables[shard] = read_table(path, len(self.description.shards[shard]))
                begin, end = self._bounds(shard, place)
                stream.seek(begin)
                record = stream.read(end - begin)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from None
        if xxhash.xxh3_64_intdigest(record) != self._tables[shard]["digest"][place]:
            raise StoreError(f"{path} is damaged: what it says of sample {number} is not what was written; {_CURE}")
        return record

    def _bounds(self, shard: int, place: int) -> tuple[int, int]:
        ends = self._tables[shard]["end"]
        return (int(ends[place - 1]) if place else 0), int(ends[place])


def read_table(path: Path, samples: int) -> np.ndarray:
    """Ends and digests of the records of a shard with so many samples.

    Raises:
        StoreError: it is no whole shard of so many.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        behind = samples * _ENTRY.itemsize + _END.size
        stream.seek(max(size - behind, 0))
        table, end = stream.read(samples * _ENTRY.itemsize), stream.read()
    if len(end) != _END.size or _END.unpack(end) != (_MAGIC, samples, xxhash.xxh3_64_intdigest(table)):
        raise StoreError(f"{path} is damaged: its index of {samples} samples is not what was written; {_CURE}")
    entries = np.frombuffer(table, _ENTRY)
    if entries["end"][-1] != size - behind:
        raise StoreError(f"{path} has {size:,} bytes, and its index is of another number: {_CURE}")
    return entries


def missing(directory: Path, description: Description) -> int:
    """Shards that are not written yet."""
    return sum(not shard_path(directory, number).is_file() for number in range(len(description.shards)))
