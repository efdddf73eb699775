# SPDX-License-Identifier: Apache-2.0
"""A teacher that runs along: model chunks of its own in the student's process groups, and nobody else's business."""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel

from ...agreement import together
from ...checkpoints.directory import CheckpointError, latest
from ...files import digest, read_digests
from ...objectives.distillation import Divergence
from ...objectives.extracts import likeliest
from ...objectives.language_modeling import Batch, language_modeling
from ...objectives.targets import DenseTargets, Targets, TopKTargets
from ..checkpoint import trained_model
from ..data import schedule_shape
from ..flags import arguments_of
from ..initialize import device
from ..mistakes import teaching_mistakes
from ..model import answer_with_logits, hear
from ..run import Run
from .objective import DistillationObjective

# What a teacher shares with its student: its ranks, and the micro-batches.
_SHARED = (
    "pipeline_model_parallel_size context_parallel_size cp_comm_type sequence_parallel micro_batch_size seq_length "
    "ternary_backend"
).split()

Surrounding = Callable[[argparse.Namespace], contextlib.AbstractContextManager[None]]


class Teacher:
    """The model of a checkpoint of ours, of any size, that says what it thinks of a student's micro-batches.

    It is built from its own arguments, in the student's layout and with the rows of the student's embedding, and is
    ternary only where its checkpoint is. It stands outside of everything that the student has: optimizer, DDP,
    checkpoints, record and telemetry never see it, and building it draws no random number of the student's.

    Args:
        args: of the student's run; gets ``distill_identity``, which tells this teacher from others.
        padded_vocab_size: of the student.
        surrounding: what holds while it is built and while it runs, from the arguments that build it.

    Attributes:
        vocab_size: ids that both know, without padding: of any other neither has learned anything.
        notes: what is to be logged.

    Raises:
        CheckpointError, ValueError: there is none, or it cannot teach this student, with the reason.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        padded_vocab_size: int,
        surrounding: Surrounding = lambda _: contextlib.nullcontext(),
    ) -> None:
        found = latest(args.distill_teacher)
        if found is None:
            raise CheckpointError(f"the teacher {args.distill_teacher}: there is no checkpoint")
        args.distill_identity = _identity(found)
        own = _arguments(args, found)
        self._surrounding = functools.partial(surrounding, own)
        with _undrawn(), _whole_stages(), self._surrounding():
            self._model = trained_model(own, found, padded_vocab_size)
        answer_with_logits(self._model)
        self._args = args
        self.vocab_size: int = min(args.vocab_size, own.vocab_size)
        numbers = sum(p.numel() for chunk in self._model.bare for p in chunk.parameters())
        kind = "ternary" if own.ternary else "bf16" if own.bf16 else "fp32"
        self.notes = [f"teacher: {found}, {kind}, {numbers:,} parameters on this rank"]

    @property
    def chunks(self) -> list[GPTModel]:
        """Of its model on this rank: one."""
        return self._model.bare

    @property
    def runs_ahead(self) -> bool:
        """Whether it has to see all micro-batches of a step before the student sees one; its stages share the work."""
        return parallel_state.get_pipeline_model_parallel_world_size() > 1

    def targets(self, batches: Sequence[Batch], keep: Callable[[torch.Tensor, Batch], Any] | None = None) -> list[Any]:
        """What it says of micro-batches on this device, in their order; nothing on any stage but the last one.

        Collective over the ranks that share the model.

        Args:
            batches: micro-batches.
            keep: what is kept of the logits ``[seq_length, micro_batch_size, V / TP]`` of each; by default
                :class:`TopKTargets` of them where ``--distill-top-k`` says how many, else :class:`DenseTargets`.
        """
        forward = functools.partial(_forward, keep or (lambda logits, batch: self.said(logits)))
        return self.hear(forward, iter(batches), len(batches), **schedule_shape(self._args))

    def hear(self, forward: Callable, data_iterator: Any, count: int, **shape: Any) -> list[Any]:
        """Runs it on micro-batches, in their order; collective over the ranks that share the model.

        Args:
            forward: as megatron-core's schedules take a ``forward_step_func`` whose second result is no loss.
            data_iterator: that ``forward`` takes them from.
            count: of micro-batches.
            shape: what the schedule is told of one: ``seq_length``, ``micro_batch_size`` and the like.

        Returns:
            What ``forward`` kept of each; nothing on any stage but the last one.
        """
        with _whole_stages(), self._surrounding():
            return hear(self._model, forward, data_iterator, count, **shape)

    def said(self, logits: torch.Tensor) -> Targets:
        """What a student is told of logits ``[seq_length, micro_batch_size, V / TP]``; collective over their ranks."""
        k, temperature = self._args.distill_top_k, self._args.distill_temperature
        if k is None:
            return DenseTargets(logits)
        group = parallel_state.get_tensor_model_parallel_group()
        # Logits that are not finite give a loss that is not: nobody waits for the device here.
        return TopKTargets(*likeliest(logits, k, self.vocab_size, temperature, group), temperature)


def learn_from_teacher(run: Run, padded_vocab_size: int) -> None:
    """Gives a run the teacher that its arguments name, and the objective to learn from it; collective over all ranks.

    Raises:
        CheckpointError, ValueError: see :class:`Teacher`.
    """
    run.teacher = Teacher(run.args, padded_vocab_size)
    run.objective = objective_of(run.args, run.teacher, run.model.bare)
    run.model.notes += run.teacher.notes


def objective_of(args: argparse.Namespace, teacher: Teacher, chunks: Sequence[GPTModel]) -> DistillationObjective:
    """What the chunks of a student are trained for, as the arguments of its run say."""
    rule = Divergence(teacher.vocab_size, args.distill_temperature, args.distill_direction == "reverse")
    return DistillationObjective(chunks, rule, args.distill_alpha)


def _forward(
    keep: Callable[[torch.Tensor, Batch], Any], batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    output, _ = language_modeling(batch, model)
    return output, lambda logits, non_loss_data: keep(logits, batch)


def _arguments(args: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """Those that build a teacher in a student's layout.

    Raises:
        ValueError: it cannot teach this student.
    """
    own = arguments_of(checkpoint, args.tensor_model_parallel_size)
    for name in _SHARED:
        setattr(own, name, getattr(args, name))
    own.expert_model_parallel_size = 1 if own.num_experts is None else args.expert_model_parallel_size
    found = teaching_mistakes(own, args)
    if found:
        raise ValueError(f"the teacher {checkpoint} cannot teach this model: {'; '.join(found)}")
    return own


def _identity(checkpoint: Path) -> dict[str, str]:
    """Tells a teacher from others by its content; collective."""
    told: list[str] = [""]
    with together():
        if torch.distributed.get_rank() == 0:
            recorded = read_digests(checkpoint)
            if recorded is None:
                recorded = {path.name: digest(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
            told = [xxhash.xxh3_128_hexdigest(json.dumps(recorded, sort_keys=True).encode())]
    torch.distributed.broadcast_object_list(told)
    return {"checkpoint": checkpoint.name, "digest": told[0]}


@contextlib.contextmanager
def _whole_stages() -> Iterator[None]:
    """While it lasts this process has no virtual stages: a teacher's are whole, whatever its student's are.

    megatron-core 0.12 asks the process, where later versions ask a chunk.
    """
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(stages)


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """Leaves the random states as they were, whatever is drawn meanwhile."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    # Of all devices of the machine by default, each of which would then hold memory of this process.
    with torch.random.fork_rng([device()] if torch.cuda.is_available() else []):
        yield
    tracker.set_states(states)
