# SPDX-License-Identifier: Apache-2.0
"""Writing of a target store: a teacher's targets for every training sample, once.

The shards of the store are divided among the data-parallel ranks, and each rank writes whole shards: what is written
depends on neither the layout nor the micro-batch size (except for the rounding of logits), and a killed writer resumes
with the shards that are missing. A thread turns targets into records and writes them while the teacher goes on.
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from tqdm import tqdm

from ...agreement import all_gathered, together
from ...data.target_records import encode_draws, encode_top_k
from ...data.target_store import (
    SAMPLED,
    Description,
    begin,
    read_table,
    samples_per_shard,
    shard_path,
    write_shard,
)
from ...files import DIGESTS, digest, write_digests
from ...files.lock import FileLock
from ...objectives.extracts import draws, likeliest, require_finite
from ...objectives.language_modeling import Batch
from .. import data
from ..data import DataError
from .parts import Samples, parts_of, shaping
from .teacher import Teacher

# The default number of draws per token; they give about 12 distinct ids.
_DRAWS = 50
# Key of a batch: the numbers of its samples in the store.
_NUMBERS = "numbers"
# How many micro-batches per pipeline stage go through the pipeline together.
_PER_STAGE = 4


def write_targets(args: argparse.Namespace) -> None:
    """Writes the store ``args.output``, or the shards that it lacks; collective over all ranks.

    Args:
        args: a run's arguments of the data and the layout, with ``train_iters`` the number of samples, or None for one
            pass; and ``distill_teacher``, ``distill_draws`` or ``distill_top_k``, ``distill_temperature`` and
            ``output``.

    Raises:
        ValueError, CheckpointError, StoreError, OSError: if the store cannot be written; the message names the cure.
    """
    tokenizer, vocabulary = data.build_tokenizer(args)
    files = data.find_files(args, tokenizer.eod)
    teacher = Teacher(args, vocabulary)
    samples = data.build_data(args, tokenizer, files)
    parts = _distinct(parts_of(args, samples.train, args.train_iters))
    description = Description(
        kind="sampled" if args.distill_top_k is None else "top-k",
        width=args.distill_top_k or args.distill_draws or _DRAWS,
        temperature=args.distill_temperature,
        vocab_size=teacher.vocab_size,
        seq_length=args.seq_length,
        seed=args.seed,
        samples_per_shard=samples_per_shard(sum(one.part.samples for one in parts), args.seq_length),
        teacher=args.distill_identity,
        tokenizer=args.tokenizer_identity,
        data={**shaping(args), "train_samples": args.train_iters},
        parts=[one.part for one in parts],
    )
    _say([*teacher.notes, *filter(None, [samples.note])])
    with _held(args.output):
        with together():
            if torch.distributed.get_rank() == 0:
                begin(args.output, description)
        waiting = _waiting(args.output, description)
        if not waiting and (args.output / DIGESTS).is_file():
            _say([f"{args.output} is complete: {description.samples:,} samples, {description.about()}"])
            return
        mine = _Writer(args, teacher, parts, description).write(waiting)
        _complete(args.output, description, waiting, mine)
    _say([f"wrote {args.output}: {description.samples:,} samples, {description.about()}"])


class _Writer:
    """Writer of one rank's shards of a store."""

    def __init__(
        self, args: argparse.Namespace, teacher: Teacher, parts: Sequence[Samples], description: Description
    ) -> None:
        self._args, self._teacher, self._about = args, teacher, description
        self._samples = _Numbered(parts)
        self._rows, self._packed = args.micro_batch_size, data.packs(args)
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._writes = parallel_state.is_pipeline_last_stage() and self._group.rank() == 0
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        self._together = 1 if stages == 1 else _PER_STAGE * stages

    def write(self, waiting: Sequence[int]) -> list[int]:
        """Writes this rank's share of the shards; returns the numbers of those that this process wrote."""
        ranks = parallel_state.get_data_parallel_world_size()
        mine, shards = waiting[parallel_state.get_data_parallel_rank() :: ranks], self._about.shards
        stream = data.read_batches(
            self._args, self._samples, (rows for shard in mine for rows in _micro_batches(shards[shard], self._rows))
        )
        first = torch.distributed.get_rank() == 0
        total = sum(len(shards[shard]) for shard in mine)
        bar = tqdm(total=total, unit="sample", desc="teacher", disable=not first, mininterval=1.0)
        with bar, ThreadPoolExecutor(1) as thread:
            pending: Future | None = None
            for shard in mine:
                records: list[bytes] = []
                steps = _micro_batches(shards[shard], self._rows)
                while numbers := list(islice(steps, self._together)):
                    batches = list(islice(stream, len(numbers)))
                    said = self._said(numbers, batches)
                    # The thread gets one task at a time, so that its failures surface and its memory stays constant.
                    if pending is not None:
                        pending.result()
                    pending = thread.submit(self._keep, records, numbers, batches, said)
                    bar.update(len({number for some in numbers for number in some}))
                if pending is not None:
                    pending.result()
                if self._writes:
                    pending = thread.submit(write_shard, shard_path(self._args.output, shard), records)
            if pending is not None:
                pending.result()
        return list(mine) if self._writes else []

    def _said(self, numbers: Sequence[Sequence[int]], batches: Sequence[data.Batch]) -> list[tuple[np.ndarray, ...]]:
        """Returns the teacher's targets of micro-batches, on the last stage, as tuples of arrays.

        The arrays are ``[micro_batch_size, seq_length, width]``, with width draws or ids per token.

        Raises:
            DataError: if the micro-batches hold tokens that the vocabulary lacks.
        """
        unknown = data.withdraw_unknown_tokens(batches, self._args.vocab_size)
        if unknown:
            last = self._args.vocab_size - 1
            raise DataError(f"the data hold {unknown[0]}, and the vocabulary ends at {last}: give their tokenizer")
        there = map(data.on_device, batches)
        numbered = [{**batch, _NUMBERS: torch.tensor(some)} for batch, some in zip(there, numbers, strict=True)]
        return self._teacher.targets(numbered, self._drawn if self._about.kind == SAMPLED else self._best)

    def _drawn(self, logits: torch.Tensor, batch: Batch) -> tuple[np.ndarray, ...]:
        about = self._about
        uniform = np.stack(
            [
                np.random.default_rng([about.seed, number]).random((about.seq_length, about.width), np.float32)
                for number in batch[_NUMBERS].tolist()
            ]
        )
        axes = (1, -1, about.width) if self._packed else uniform.shape
        numbers = torch.from_numpy(uniform).reshape(axes).transpose(0, 1).to(logits.device)
        return (self._as_rows(draws(logits, numbers, about.vocab_size, about.temperature, self._group)),)

    def _best(self, logits: torch.Tensor, batch: Batch) -> tuple[np.ndarray, ...]:
        about = self._about
        found = likeliest(logits, about.width, about.vocab_size, about.temperature, self._group)
        require_finite(found[1])
        return tuple(map(self._as_rows, found))

    def _as_rows(self, said: torch.Tensor) -> np.ndarray:
        """Turns targets with the token axes of the logits into an array ``[micro_batch_size, seq_length, width]``."""
        rows = said.transpose(0, 1).reshape(self._rows, self._about.seq_length, -1)
        return rows.cpu().numpy()

    def _keep(
        self,
        records: list[bytes],
        numbers: Sequence[Sequence[int]],
        batches: Sequence[Batch],
        said: Sequence[tuple[np.ndarray, ...]],
    ) -> None:
        """Appends the records of the samples of micro-batches, without the repetitions that fill the last one."""
        if not self._writes:
            return
        for some, batch, arrays in zip(numbers, batches, said, strict=True):
            tokens = batch["tokens"].reshape(self._rows, -1).numpy()
            for row in range(len(set(some))):
                if self._about.kind == SAMPLED:
                    records.append(encode_draws(tokens[row], arrays[0][row], self._about.vocab_size))
                else:
                    records.append(encode_top_k(tokens[row], arrays[0][row], arrays[1][row]))


class _Numbered(torch.utils.data.Dataset):
    """The samples of all parts, indexed by their numbers in the store."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = parts
        self._begins = np.cumsum([0, *(one.part.samples for one in parts)])
        self.config = parts[0].dataset.config

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        place = int(np.searchsorted(self._begins, number, side="right")) - 1
        return self._parts[place][number - int(self._begins[place])]


def _distinct(parts: Mapping[int, Samples]) -> list[Samples]:
    """Returns each part once, with the most samples that any occurrence has; a blend may name a file twice."""
    found: dict[str, Samples] = {}
    for one in parts.values():
        held = found.get(one.part.digest)
        if held is None or held.part.samples < one.part.samples:
            found[one.part.digest] = one
    return list(found.values())


def _micro_batches(numbers: range, size: int) -> Iterator[list[int]]:
    """Yields the numbers of a shard's samples in micro-batches of equal size; the last repeats its last sample."""
    for start in range(numbers.start, numbers.stop, size):
        yield [min(start + row, numbers.stop - 1) for row in range(size)]


def _waiting(directory: Path, description: Description) -> list[int]:
    """Returns the shards that do not exist yet, as rank 0 sees them before any rank writes; collective.

    Raises:
        StoreError: if an existing shard is damaged.
    """
    told: list[list[int]] = [[]]
    with together():
        if torch.distributed.get_rank() == 0:
            for number, samples in enumerate(description.shards):
                path = shard_path(directory, number)
                if path.is_file():
                    read_table(path, len(samples))
                else:
                    told[0].append(number)
    torch.distributed.broadcast_object_list(told)
    return told[0]


def _complete(directory: Path, description: Description, waiting: Sequence[int], mine: Sequence[int]) -> None:
    """Writes the digests of all shards once every rank has written its own; collective."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # The digests of shards from an earlier attempt are computed by all ranks, each a share.
    before = sorted({*range(len(description.shards))} - {*waiting})[rank::ranks]
    with together():
        known = {path.name: digest(path) for path in (shard_path(directory, shard) for shard in [*mine, *before])}
    everybody: list[dict[str, Any]] = all_gathered(known)
    with together():
        if rank == 0:
            write_digests(directory, {name: entry for some in everybody for name, entry in some.items()})


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Keeps other jobs from writing the same store during a block; collective."""
    lock = None
    try:
        with together():
            if torch.distributed.get_rank() == 0:
                lock = FileLock(directory.parent / f".{directory.name}.lock")
        yield
    finally:
        if lock is not None:
            lock.release()


def _say(lines: Sequence[str]) -> None:
    if torch.distributed.get_rank() == 0:
        print("\n".join(lines), flush=True)
