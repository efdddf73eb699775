# SPDX-License-Identifier: Apache-2.0
"""Distillation from a target store: its checks against the run, and the targets of each micro-batch."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset

from ...agreement import together
from ...attention.documents import of_rank
from ...data.target_records import decode_draws, decode_top_k, is_of
from ...data.target_store import SAMPLED, StoreError, TargetStore
from ...objectives.distillation import Divergence
from ...objectives.targets import SampledTargets, TopKTargets
from ..data import STORED, packs
from ..run import Run
from .objective import TARGETS, DistillationObjective
from .parts import Samples, parts_of, shaping


class StoredTargets:
    """A teacher's targets for the samples of a run, read from a store.

    Args:
        args: the arguments of the run; they get ``distill_identity``, which distinguishes this store from others, and
            the store's temperature.

    Attributes:
        vocab_size: the number of ids that the targets are about, without padding.
        notes: lines for the log.

    Raises:
        StoreError: if the store is missing, damaged or incomplete, or has another tokenizer, vocabulary or temperature.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._store = TargetStore(Path(args.distill_targets))
        about = self._store.description
        self.vocab_size = about.vocab_size
        asked = args.distill_temperature
        mistakes = {
            "its samples were cut by another tokenizer": about.tokenizer != args.tokenizer_identity,
            f"its targets are of {about.vocab_size} ids and the model has {args.vocab_size}: give --vocab-size "
            f"{about.vocab_size}": about.vocab_size > args.vocab_size,
            f"its targets were written at a temperature of {about.temperature:g}, and serve no other: leave out "
            "--distill-temperature": asked not in (None, about.temperature),
        }
        found = [said for said, wrong in mistakes.items() if wrong]
        if found:
            raise StoreError(f"--distill-targets {args.distill_targets} cannot be learned from: {'; '.join(found)}")
        args.distill_temperature = about.temperature
        checkpoint = about.teacher.get("checkpoint", "?")
        args.distill_identity = {"checkpoint": checkpoint, "digest": self._store.digest}
        self.notes = [f"targets: {args.distill_targets}, {about.about()}, of {checkpoint}"]

    def beside(self, dataset: Any) -> Any:
        """Returns the training samples together with their targets, or without them if this rank computes no loss.

        Raises:
            StoreError: if the store does not hold all samples that the run is going to take.
        """
        wanted = self._args.train_iters * self._args.global_batch_size
        parts = parts_of(self._args, dataset, wanted)
        begins = {place: self._begin(samples) for place, samples in parts.items()}
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return dataset
        return _Taught(dataset, parts, begins, self._store)

    def attach(self, batches: Sequence[dict[str, Any]]) -> list[str]:
        """Adds to micro-batches the :data:`TARGETS` of this context-parallel rank's tokens.

        Returns:
            Messages about damaged records, whose targets are all zero; the caller makes the ranks agree on them.
        """
        found: list[str] = []
        for batch in batches:
            if STORED in batch:
                stored = batch.pop(STORED)
                found += filter(None, stored["damage"])
                batch[TARGETS] = self._targets(*(self._of_this_rank(stored[name]) for name in ("ids", "weights")))
        return found

    def _of_this_rank(self, rows: torch.Tensor) -> torch.Tensor:
        """Takes this rank's tokens from rows ``[micro_batch_size, seq_length, k]``, with the token axes of the logits.

        k is the number of ids that the store has room for per token.
        """
        if packs(self._args):
            whole = rows.reshape(1, -1, rows.shape[-1])
            rows = of_rank(whole, 1, parallel_state.get_context_parallel_rank(), self._args.context_parallel_size)
        return rows.transpose(0, 1)

    def _targets(self, ids: torch.Tensor, weights: torch.Tensor) -> SampledTargets | TopKTargets:
        about = self._store.description
        if about.kind != SAMPLED:
            return TopKTargets(ids.contiguous(), weights.contiguous(), about.temperature)
        # Few tokens have as many distinct ids as draws, so that the arrays can be narrower.
        width = max(int((weights > 0).sum(-1).max()), 1)
        ids, weights = ids[..., :width].contiguous(), weights[..., :width].contiguous()
        return SampledTargets(ids, weights, about.width, about.temperature)

    def _begin(self, samples: Samples) -> int:
        """Returns the number in the store of a part's first sample.

        Raises:
            StoreError: if the store lacks the part, or holds fewer samples of it than the run takes.
        """
        about, part, where = self._store.description, samples.part, self._args.distill_targets
        begin = 0
        for held in about.parts:
            if held.digest == part.digest:
                if held.samples < part.samples:
                    raise StoreError(
                        f"--distill-targets {where} holds {held.samples:,} samples of {part.name}, and the run takes "
                        f"{part.samples:,}: write targets with --train-samples, or give fewer --train-iters"
                    )
                return begin
            begin += held.samples
        now = shaping(self._args)
        changed = [
            f"--{name.replace('_', '-')} {about.data.get(name)} (now {now.get(name)})"
            for name in sorted({*about.data, *now} - {"train_samples"})
            if about.data.get(name) != now.get(name)
        ]
        wanted = self._args.train_iters * self._args.global_batch_size
        why = (
            "its files are others, or the run makes more passes over them than the writer did (write targets with "
            f"--train-samples {wanted}, or give fewer --train-iters)"
        )
        if changed:
            why = f"it was written with {', '.join(changed)}"
        raise StoreError(f"--distill-targets {where} says nothing of the samples of {part.name}: {why}")


class _Taught(torch.utils.data.Dataset):
    """Training samples, each with its targets from a store.

    Under :data:`STORED` a sample has ``ids`` (int32) and ``weights`` (uint8 counts of draws, or fp16 logarithms of the
    top k), both ``[seq_length, k]`` with k draws or ids, and under ``damage`` why they could not be read, or "".
    """

    def __init__(
        self, dataset: Any, parts: Mapping[int, Samples], begins: Mapping[int, int], store: TargetStore
    ) -> None:
        self._dataset, self._parts, self._begins, self._store = dataset, parts, begins, store
        self.config = dataset.config

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._dataset[index]
        number = self._number(index)
        about = self._store.description
        damage = ""
        try:
            record = self._store.record(number)
            if not is_of(record, sample["tokens"].numpy()):
                raise StoreError(f"{self._store.directory} has other tokens in sample {number} than the data")
            if about.kind == SAMPLED:
                ids, weights = decode_draws(record, about.seq_length, about.width, about.vocab_size)
            else:
                ids, weights = decode_top_k(record, about.seq_length, about.width)
        except StoreError as error:
            # Raising here would leave the other ranks waiting: StoredTargets.attach() returns the message instead.
            damage = str(error)
            shape = (about.seq_length, about.width)
            ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.uint8 if about.kind == SAMPLED else np.float16)
        stored = {"ids": torch.from_numpy(ids), "weights": torch.from_numpy(weights), "damage": damage}
        return {**sample, STORED: stored}

    def _number(self, index: int) -> int:
        """Returns the number in the store of the sample at an index."""
        place = 0
        if isinstance(self._dataset, BlendedDataset):
            place, index = int(self._dataset.dataset_index[index]), int(self._dataset.dataset_sample_index[index])
        return self._begins[place] + self._parts[place].number(index)


def learn_from_targets(run: Run) -> None:
    """Gives a run the target store that its arguments name, and the objective to learn from it; collective.

    Raises:
        StoreError: if :class:`StoredTargets` refuses the store; on every rank alike.
    """
    args = run.args
    with together():
        run.stored = StoredTargets(args)
    rule = Divergence(run.stored.vocab_size, args.distill_temperature)
    run.objective = DistillationObjective(run.model.bare, rule, args.distill_alpha)
    run.model.notes += run.stored.notes


def refuse_damage(found: Sequence[str]) -> None:
    """Raises a StoreError on every rank if :meth:`StoredTargets.attach` found damage on some rank; collective."""
    with together():
        if found:
            raise StoreError(found[0])
