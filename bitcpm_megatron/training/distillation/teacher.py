# SPDX-License-Identifier: Apache-2.0
"""A teacher that runs beside its student: model chunks of its own in the student's process groups.

In shapes, V is the padded vocabulary size and TP the number of tensor-parallel ranks.
"""

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

# The arguments that a teacher shares with its student: those of the layout and of the micro-batches.
_SHARED = (
    "pipeline_model_parallel_size context_parallel_size cp_comm_type sequence_parallel micro_batch_size seq_length "
    "ternary_backend"
).split()

Surrounding = Callable[[argparse.Namespace], contextlib.AbstractContextManager[None]]


class Teacher:
    """The model of one of our checkpoints, of any size, that gives targets for a student's micro-batches.

    It is built from its own arguments, in the student's layout and with as many embedding rows as the student, and is
    ternary only if its checkpoint is. It is separate from everything of the student: optimizer, DDP, checkpoints,
    quantizer record and telemetry never see it, and building it leaves the student's random states as they are.

    Args:
        args: the arguments of the student's run; they get ``distill_identity``, which distinguishes this teacher from
            others.
        padded_vocab_size: the student's padded vocabulary size.
        surrounding: makes, from the arguments that build the teacher, the context in which it is built and runs.

    Attributes:
        vocab_size: the number of ids that both models know, without padding; other ids mean nothing to one of them.
        notes: lines for the log.

    Raises:
        CheckpointError, ValueError: if there is no checkpoint, or it cannot teach this student; with the reason.
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
        """The chunks of the teacher's model on this rank; there is exactly one."""
        return self._model.bare

    @property
    def runs_ahead(self) -> bool:
        """Whether the teacher must see all micro-batches of a step before the student does, as with pipeline stages."""
        return parallel_state.get_pipeline_model_parallel_world_size() > 1

    def targets(self, batches: Sequence[Batch], keep: Callable[[torch.Tensor, Batch], Any] | None = None) -> list[Any]:
        """Returns the targets of micro-batches, in their order; an empty list on all stages except the last.

        Collective over the ranks that share the model.

        Args:
            batches: the micro-batches, on this process's device.
            keep: makes a target from the logits ``[seq_length, micro_batch_size, V / TP]`` of a micro-batch; by default
                :class:`TopKTargets` if ``--distill-top-k`` is given, else :class:`DenseTargets`.
        """
        forward = functools.partial(_forward, keep or (lambda logits, batch: self.said(logits)))
        return self.hear(forward, iter(batches), len(batches), **schedule_shape(self._args))

    def hear(self, forward: Callable, data_iterator: Any, count: int, **shape: Any) -> list[Any]:
        """Runs the teacher on micro-batches, in their order; collective over the ranks that share the model.

        Args:
            forward: a ``forward_step_func`` of megatron-core's schedules whose second result collects non-loss data.
            data_iterator: the iterator from which ``forward`` takes the micro-batches.
            count: the number of micro-batches.
            shape: the shape of a micro-batch for the schedule: ``seq_length``, ``micro_batch_size`` and the like.

        Returns:
            The data that ``forward`` collected of each micro-batch; empty on all stages except the last.
        """
        with _whole_stages(), self._surrounding():
            return hear(self._model, forward, data_iterator, count, **shape)

    def said(self, logits: torch.Tensor) -> Targets:
        """Returns the targets of logits ``[seq_length, micro_batch_size, V / TP]``; collective over the TP ranks."""
        k, temperature = self._args.distill_top_k, self._args.distill_temperature
        if k is None:
            return DenseTargets(logits)
        group = parallel_state.get_tensor_model_parallel_group()
        # This does not check the logits, which would wait for the device: if they are not finite, neither is the loss.
        return TopKTargets(*likeliest(logits, k, self.vocab_size, temperature, group), temperature)


def learn_from_teacher(run: Run, padded_vocab_size: int) -> None:
    """Gives a run the teacher that its arguments name, and the objective to learn from it; collective over all ranks.

    Raises:
        CheckpointError, ValueError: if :class:`Teacher` refuses the teacher.
    """
    run.teacher = Teacher(run.args, padded_vocab_size)
    run.objective = objective_of(run.args, run.teacher, run.model.bare)
    run.model.notes += run.teacher.notes


def objective_of(args: argparse.Namespace, teacher: Teacher, chunks: Sequence[GPTModel]) -> DistillationObjective:
    """Returns the training objective for a student's chunks, as the arguments of its run say."""
    rule = Divergence(teacher.vocab_size, args.distill_temperature, args.distill_direction == "reverse")
    return DistillationObjective(chunks, rule, args.distill_alpha)


def _forward(
    keep: Callable[[torch.Tensor, Batch], Any], batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    output, _ = language_modeling(batch, model)
    return output, lambda logits, non_loss_data: keep(logits, batch)


def _arguments(args: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """Returns the arguments that build a teacher in a student's layout.

    Raises:
        ValueError: if the teacher cannot teach this student.
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
    """Returns what distinguishes a teacher from others, a digest of its checkpoint's content; collective."""
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
    """Hides the virtual stages of this process in a block: a teacher's stages are whole even if its student's are not.

    megatron-core 0.12 reads them from the process, later versions from a chunk.
    """
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(stages)


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """Restores the random states at the end of a block, whatever was drawn in it."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    # By default, fork_rng() takes all devices of the machine, and this process would then hold memory on each of them.
    with torch.random.fork_rng([device()] if torch.cuda.is_available() else []):
        yield
    tracker.set_states(states)
