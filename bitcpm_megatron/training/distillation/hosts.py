# SPDX-License-Identifier: Apache-2.0
"""Distillation in a host, where the model, the training loop and the forward step are Megatron-LM's.

The teacher runs through the forward step of the host's own script, which takes a micro-batch from the data, passes it
to the tensor-parallel ranks that read none, and calls a model with it. The teacher therefore sees exactly what its
student sees, whatever the script does to a micro-batch.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_attr_wrapped_model

from ...checkpoints.compatibility import ARCHITECTURE
from ...checkpoints.directory import latest, saved_arguments
from ...data.tokenizers import open_tokenizer
from ...data.vocabulary import TOKENIZER_TYPES
from ...objectives.distillation import Losses
from ...objectives.targets import Targets
from ...patches.megatron_core import schedules
from .objective import DistillationObjective
from .teacher import Teacher, objective_of

LM_LOSS, DISTILL_LOSS = "lm loss", "distill loss"
"""Names in the host's log: of the cross entropy, as without a teacher, and of the divergence."""

# The arguments that describe a model, and those of virtual pipeline stages, of which a teacher has none.
_DESCRIBING = (*ARCHITECTURE, "max_position_embeddings", "bf16", "attention_dropout", "hidden_dropout")
_VIRTUAL = (
    "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank virtual_pipeline_model_parallel_size"
).split()
# The arguments with which a host gives its schedules the shape of a micro-batch.
_SHAPE = ("seq_length", "micro_batch_size", "decoder_seq_length")


def learn_in_host(args: argparse.Namespace, chunks: Sequence[GPTModel], vocab_size: int) -> list[str]:
    """Gives a host's model the teacher that ``--distill-teacher`` names; collective over all ranks.

    Args:
        args: the host's arguments; they get ``distill_identity``, which the host's checkpoints record with them.
        chunks: the student's model chunks on this rank, without wrappers.
        vocab_size: the size of the student's vocabulary, without padding.

    Returns:
        Lines for the log.

    Raises:
        CheckpointError, ValueError: if :class:`~.teacher.Teacher` refuses the teacher, or the teacher has experts.
    """
    checkpoint = latest(args.distill_teacher)
    if checkpoint is not None and saved_arguments(checkpoint).get("num_experts"):
        raise ValueError(
            f"the teacher {checkpoint} has experts, which were not tried in hosts: use launch/pretrain.py, or another "
            "teacher"
        )
    identity = _tokenizer_identity(args)
    # The host's cp_comm_type is a list that our models do not take; without context parallelism it has no effect.
    ours = {"cp_comm_type": "a2a", "tokenizer_identity": identity, "vocab_size": vocab_size}
    student = argparse.Namespace(**{**vars(args), **ours})
    teacher = Teacher(student, args.padded_vocab_size, functools.partial(_described, args))
    args.distill_identity = student.distill_identity
    for chunk in teacher.chunks:
        chunk.register_forward_pre_hook(_without_mask, with_kwargs=True)
    schedules.change_training(chunks, _Taught(teacher, objective_of(student, teacher, chunks)))
    if identity is None:
        kind = f"--tokenizer-type {args.tokenizer_type}"
        return [*teacher.notes, f"the tokenizer was not compared with the teacher's, which takes no {kind}"]
    return teacher.notes


class _Taught:
    """A change of a training schedule's arguments, after which its forward step consults the teacher first."""

    def __init__(self, teacher: Teacher, objective: DistillationObjective) -> None:
        self._teacher, self._objective = teacher, objective

    def __call__(self, called: Mapping[str, Any]) -> dict[str, Any]:
        forward, count = called["forward_step_func"], called["num_microbatches"]
        shape = {name: called[name] for name in _SHAPE if name in called}
        if not self._teacher.runs_ahead:
            return {**called, "forward_step_func": functools.partial(self._beside, forward, shape)}
        data = called["data_iterator"]
        # One list of micro-batches for each chunk; None if the step reads no data.
        read = [_taken(one, count) for one in (data if isinstance(data, list) else [data])]
        own = read[0] if parallel_state.is_pipeline_first_stage(ignore_virtual=True) else read[-1]
        said = self._teacher.hear(functools.partial(self._say, forward), _again(own), count, **shape)
        again = [_again(batches) for batches in read]
        return {
            **called,
            "forward_step_func": functools.partial(self._after, forward, iter(said)),
            "data_iterator": again if isinstance(data, list) else again[0],
        }

    def _beside(
        self, forward: Callable, shape: Mapping[str, Any], data: Iterator | None, model: torch.nn.Module, *more: Any
    ) -> tuple[Any, Callable]:
        """Runs a forward step without pipeline stages: the teacher sees each micro-batch just before the student."""
        batch = _taken(data, 1)
        (said,) = self._teacher.hear(functools.partial(self._say, forward), _again(batch), 1, **shape)
        return self._learn(said, lambda: forward(_again(batch), model, *more))

    def _after(
        self, forward: Callable, said: Iterator[Targets], data: Iterator | None, model: torch.nn.Module, *more: Any
    ) -> tuple[Any, Callable]:
        """Runs a forward step of a pipeline stage, after the teacher has seen all micro-batches of the step.

        However the schedule alternates between chunks, each chunk sees its micro-batches in their order.
        """
        heard = next(said) if get_attr_wrapped_model(model, "post_process") else None
        return self._learn(heard, lambda: forward(data, model, *more))

    def _say(self, forward: Callable, data: Iterator | None, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        """Runs the host's forward step on the teacher, whose output is logits, with targets instead of a loss."""
        output, _ = forward(data, model)
        return output, lambda logits, non_loss_data: self._teacher.said(logits)

    def _learn(self, said: Targets | None, forward: Callable[[], tuple[Any, Callable]]) -> tuple[Any, Callable]:
        (output, loss_of), losses = self._objective.heed(said, forward)
        return output, loss_of if losses is None else functools.partial(_reported, loss_of, losses)


def _taken(data: Iterator | None, count: int) -> list[Any] | None:
    return None if data is None else [next(data) for _ in range(count)]


def _again(batches: Iterable[Any] | None) -> Iterator | None:
    return None if batches is None else iter(batches)


def _reported(loss_of: Callable, losses: Losses, output: torch.Tensor) -> tuple[Any, ...]:
    """Computes the host's loss of the mixture of cross entropy and divergence, and reports the two parts instead.

    Raises:
        ValueError: if the host's script reports no language-modeling loss.
    """
    *loss, reported = loss_of(output)
    if LM_LOSS not in reported:
        names = ", ".join(map(str, reported))
        raise ValueError(f"--distill-teacher: this script reports {names} and no {LM_LOSS}: use pretrain_gpt.py")
    # The host's own function is used because it knows over which ranks the parts are summed, and in which form.
    parts = {LM_LOSS: losses.cross_entropy, DISTILL_LOSS: losses.divergence}
    with torch.no_grad():
        told = {name: loss_of(part)[-1][LM_LOSS] for name, part in parts.items() if part is not None}
    return *loss, {**reported, **told}


@contextlib.contextmanager
def _described(args: argparse.Namespace, own: argparse.Namespace) -> Iterator[None]:
    """Lets the host's arguments describe the teacher in a block; MindSpeed reads them to build and to run a model."""
    now = {name: getattr(own, name) for name in _DESCRIBING if hasattr(args, name)}
    now |= {name: None for name in _VIRTUAL if hasattr(args, name)}
    before = {name: getattr(args, name) for name in now}
    vars(args).update(now)
    try:
        yield
    finally:
        vars(args).update(before)


def _without_mask(chunk: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Removes the attention mask from a teacher's inputs: its attention is causal, and other masks are refused."""
    if len(args) > 2:
        return (*args[:2], None, *args[3:]), kwargs
    return args, {**kwargs, "attention_mask": None}


def _tokenizer_identity(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the tokenizer's identity as in our own loop; None if our loop does not have this kind of tokenizer."""
    if args.tokenizer_type in TOKENIZER_TYPES and args.tokenizer_model and Path(args.tokenizer_model).exists():
        # The host has read the tokenizer, so that it is no mistake of the job if our reader refuses it.
        with contextlib.suppress(ValueError, OSError):
            return dict(open_tokenizer(args.tokenizer_model, args.tokenizer_type).unique_identifiers)
    return None
