# SPDX-License-Identifier: Apache-2.0
"""A teacher in a host: the model and the training loop are Megatron-LM's, and so is the step that reads micro-batches.

The teacher runs through the forward step of the host's own script, which takes the micro-batch from the data, hands it
to the tensor-parallel ranks that read none, and calls a model with it. So it sees what its student sees, whatever the
script does to a micro-batch.
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
"""Names in the host's log: cross entropy, as without a teacher, and the divergence."""

# Of a model, and of virtual stages, of which a teacher has none.
_DESCRIBING = (*ARCHITECTURE, "max_position_embeddings", "bf16", "attention_dropout", "hidden_dropout")
_VIRTUAL = (
    "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank virtual_pipeline_model_parallel_size"
).split()
# What a host tells its schedules of a micro-batch.
_SHAPE = ("seq_length", "micro_batch_size", "decoder_seq_length")


def learn_in_host(args: argparse.Namespace, chunks: Sequence[GPTModel], vocab_size: int) -> list[str]:
    """Gives a host's model the teacher that ``--distill-teacher`` names; collective over all ranks.

    Args:
        args: the host's; get ``distill_identity``, which the host's checkpoints record with them.
        chunks: of the student on this rank, without wrappers.
        vocab_size: tokens that the student knows, without padding.

    Returns:
        Lines for the log.

    Raises:
        CheckpointError, ValueError: see :class:`~.teacher.Teacher`; also a teacher with experts.
    """
    checkpoint = latest(args.distill_teacher)
    if checkpoint is not None and saved_arguments(checkpoint).get("num_experts"):
        raise ValueError(
            f"the teacher {checkpoint} has experts, which were not tried in hosts: use launch/pretrain.py, or another "
            "teacher"
        )
    identity = _tokenizer_identity(args)
    # The host's list of ways in which ranks share tokens is none that our models know, and of no use here.
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
    """What a schedule that trains the student is called with: a forward step that hears the teacher first."""

    def __init__(self, teacher: Teacher, objective: DistillationObjective) -> None:
        self._teacher, self._objective = teacher, objective

    def __call__(self, called: Mapping[str, Any]) -> dict[str, Any]:
        forward, count = called["forward_step_func"], called["num_microbatches"]
        shape = {name: called[name] for name in _SHAPE if name in called}
        if not self._teacher.runs_ahead:
            return {**called, "forward_step_func": functools.partial(self._beside, forward, shape)}
        data = called["data_iterator"]
        # One for each chunk; None where the step reads nothing.
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
        """A forward step without pipeline stages: of each micro-batch the teacher's logits are there when needed."""
        batch = _taken(data, 1)
        (said,) = self._teacher.hear(functools.partial(self._say, forward), _again(batch), 1, **shape)
        return self._learn(said, lambda: forward(_again(batch), model, *more))

    def _after(
        self, forward: Callable, said: Iterator[Targets], data: Iterator | None, model: torch.nn.Module, *more: Any
    ) -> tuple[Any, Callable]:
        """A forward step of a stage, when the teacher has seen all of the step.

        Whatever the order in which chunks take turns, each sees its micro-batches in theirs.
        """
        heard = next(said) if get_attr_wrapped_model(model, "post_process") else None
        return self._learn(heard, lambda: forward(data, model, *more))

    def _say(self, forward: Callable, data: Iterator | None, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        """The host's forward step of the teacher, whose output is logits, with targets in the place of a loss."""
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
    """The host's loss of the mixture, reported by its parts.

    Raises:
        ValueError: the host's script reports no language-modeling loss.
    """
    *loss, reported = loss_of(output)
    if LM_LOSS not in reported:
        names = ", ".join(map(str, reported))
        raise ValueError(f"--distill-teacher: this script reports {names} and no {LM_LOSS}: use pretrain_gpt.py")
    # The host's own function: it knows over which ranks the parts are summed, and in which form.
    parts = {LM_LOSS: losses.cross_entropy, DISTILL_LOSS: losses.divergence}
    with torch.no_grad():
        told = {name: loss_of(part)[-1][LM_LOSS] for name, part in parts.items() if part is not None}
    return *loss, {**reported, **told}


@contextlib.contextmanager
def _described(args: argparse.Namespace, own: argparse.Namespace) -> Iterator[None]:
    """While it lasts, the host's arguments describe the teacher: MindSpeed asks them to build and to run a model."""
    now = {name: getattr(own, name) for name in _DESCRIBING if hasattr(args, name)}
    now |= {name: None for name in _VIRTUAL if hasattr(args, name)}
    before = {name: getattr(args, name) for name in now}
    vars(args).update(now)
    try:
        yield
    finally:
        vars(args).update(before)


def _without_mask(chunk: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Its attention is causal by itself; whatever asks for another mask is refused."""
    if len(args) > 2:
        return (*args[:2], None, *args[3:]), kwargs
    return args, {**kwargs, "attention_mask": None}


def _tokenizer_identity(args: argparse.Namespace) -> dict[str, Any] | None:
    """What tells the tokenizer from others as in our own loop; None of a kind that our loop does not have."""
    if args.tokenizer_type in TOKENIZER_TYPES and args.tokenizer_model and Path(args.tokenizer_model).exists():
        # The host has read it, and what ours would refuse is no mistake of the job's.
        with contextlib.suppress(ValueError, OSError):
            return dict(open_tokenizer(args.tokenizer_model, args.tokenizer_type).unique_identifiers)
    return None
