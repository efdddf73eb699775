# SPDX-License-Identifier: Apache-2.0
"""A target store: a teacher's targets for every sample of a data set, written once and read by students of any layout.

A store is a directory with ``store.json``, which describes the targets and the samples; shards ``targets-00000.bin``
with a fixed number of samples each; and ``DIGESTS.json``, which comes last: a store without it is not complete. A
writer writes whole shards, each under a temporary name, so that several writers can share the shards among themselves
and a killed one leaves only whole shards.

Samples are numbered through the parts of the data in order (:class:`Part`). A shard holds the records of its samples
(:mod:`~.target_records`); then for each of them its end in the shard and its XXH3-64, two uint64; and last
``b"BITCPMT1"``, the number of samples, and the XXH3-64 of those pairs. Sizes are compared with ``DIGESTS.json`` when a
store is opened, and every record with its digest when it is read, so that nothing damaged is trained on.
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
# About a thousand shards, but none so small that there are too many files, and none so large that a kill costs much.
_SHARDS, _LEAST_TOKENS, _MOST_TOKENS = 1024, 2**14, 2**20
_MAX_SHARDS = 2**20
_CURE = f"copy the store again, or delete this file and {DIGESTS} and let write_targets.py go on"


class StoreError(FileError):
    """The exception for a target store that is absent, incomplete, damaged, or of other samples than requested."""


class Part(Strict):
    """The samples of one dataset of a blend, in one order.

    Attributes:
        name: the name of the data files, for people.
        digest: the digest of the files and of everything that decides which tokens are which sample.
        samples: the number of samples in the store, which are the first ones of the part.
    """

    name: str
    digest: str
    samples: Annotated[int, bounded(Whole(1, 2**48))]


class Description(Strict):
    """The description of a store: what its targets are, and of which samples.

    Attributes:
        kind: the kind of the targets.
        width: the number of draws of each token, or the k of top-k.
        temperature: the temperature of the teacher's softmax.
        vocab_size: the number of ids that the softmax was taken over.
        seq_length: the number of tokens of a sample.
        seed: the seed of the draws, which are seeded with it and the number of the sample.
        samples_per_shard: the number of samples of a shard; the last shard may have fewer.
        teacher: the name of the teacher's checkpoint, and a digest of its contents.
        tokenizer: the identity of the tokenizer, which tells it from others.
        data: the arguments that shaped the samples, for people: the digests of the parts decide.
        parts: the parts of the data.
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
        """The number of samples of all parts."""
        return sum(part.samples for part in self.parts)

    @property
    def shards(self) -> list[range]:
        """The numbers of the samples of each shard."""
        size = self.samples_per_shard
        return [range(begin, min(begin + size, self.samples)) for begin in range(0, self.samples, size)]

    def about(self) -> str:
        """Describes the targets for people, such as ``50 draws of 73,448 ids at a temperature of 1``."""
        what = f"{self.width} draws" if self.kind == SAMPLED else f"the {self.width} likeliest"
        return f"{what} of {self.vocab_size:,} ids at a temperature of {self.temperature:g}"


def samples_per_shard(samples: int, seq_length: int) -> int:
    """Returns the number of samples per shard for a store of so many samples of `seq_length` tokens."""
    tokens = min(max(samples * seq_length // _SHARDS, _LEAST_TOKENS), _MOST_TOKENS)
    return max(tokens // seq_length, 1)


def shard_path(directory: Path, shard: int) -> Path:
    """Returns the path of a shard."""
    return directory / f"targets-{shard:05d}.bin"


def read_description(directory: Path) -> Description:
    """Reads the description of a store, complete or still being written.

    Raises:
        StoreError: if the directory is no store, or its description is damaged.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise StoreError(f"{directory} is no target store: it has no {DESCRIPTION}")
    try:
        found = validated(Description, read_json(path), str(path))
    except FileError as error:
        raise StoreError(str(error)) from None
    if found.samples > _MAX_SHARDS * found.samples_per_shard:
        raise StoreError(f"{path}: {found.samples:,} samples in shards of {found.samples_per_shard} cannot be")
    if found.kind == SAMPLED and found.width > MAX_DRAWS:
        raise StoreError(f"{path}: {found.width} draws are more than {MAX_DRAWS}")
    return found


def begin(directory: Path, description: Description) -> None:
    """Makes a directory an empty store with this description; leaves an existing store with the same one unchanged.

    Raises:
        StoreError: if the directory holds another store, or something else.
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
        OSError: if the shard cannot be written.
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
            error.filename = os.fspath(path)  # the error of a full disk names no file
        raise


class TargetStore:
    """A complete store, opened for reading; it can be sent to other processes.

    Args:
        directory: the directory of the store.

    Attributes:
        directory: the directory of the store.
        description: the description of the store.
        digest: a digest of the contents of the store.

    Raises:
        StoreError: if the directory is no store, the store is not complete, or a file is missing, cut or changed.
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
        """Returns the record of a sample, as it was written.

        Raises:
            StoreError: if the record is damaged or cannot be read.
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
    """Returns the ends and the digests of the records of a shard with so many samples.

    Raises:
        StoreError: if the file is no whole shard of so many samples.
        OSError: if the file cannot be read.
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
    """Counts the shards that are not written yet."""
    return sum(not shard_path(directory, number).is_file() for number in range(len(description.shards)))
