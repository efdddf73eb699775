# SPDX-License-Identifier: Apache-2.0
"""Distillation losses over a vocabulary split over all ranks, compared with their definitions on one rank.

Each rank reports for every case the largest relative errors of its losses and of its part of the gradient, the number
of its reductions, and the bytes of each kind of collective.
"""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state
from steps.meters import CollectiveBytes
from support.distillation import by_definition, forms, relative
from torch.distributed import ReduceOp
from torch.distributed.nn.functional import all_gather

from bitcpm_megatron.objectives import distillation as module
from bitcpm_megatron.objectives.distillation import Divergence, distillation, divergence
from bitcpm_megatron.objectives.targets import DenseTargets, Targets
from bitcpm_megatron.patches import cpu

TOKENS, WIDTH = (6, 2), 64
# With two ranks: padding in a part of the last rank's columns, nowhere, and in all columns of the last rank.
VOCABULARIES = {"padded": 100, "full": 128, "one rank": 60}

Loss = Callable[[torch.Tensor, Targets, Divergence], torch.Tensor]


def ours(logits: torch.Tensor, targets: Targets, rule: Divergence) -> torch.Tensor:
    return divergence(logits, targets, rule, torch.distributed.group.WORLD)


def plain_all_reduce(logits: torch.Tensor, targets: Targets, rule: Divergence) -> torch.Tensor:
    """Planted bug: sums over ranks that autograd treats as values of this rank alone."""

    def log_softmax(x: torch.Tensor) -> torch.Tensor:
        maximum = x.detach().amax(-1, keepdim=True)
        torch.distributed.all_reduce(maximum, ReduceOp.MAX)
        total = (x - maximum).exp().sum(-1, keepdim=True)
        torch.distributed.all_reduce(total)
        return x - maximum - total.log()

    log_q, log_p = log_softmax(logits), log_softmax(targets.logits)
    losses = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.distributed.all_reduce(losses)
    return losses


def all_gather_of_logits(logits: torch.Tensor, targets: Targets, rule: Divergence) -> torch.Tensor:
    """Planted bug: every rank computes the whole loss, and the backward of the gather sums gradients of all ranks."""
    log_q, log_p = (torch.cat(all_gather(x), -1).log_softmax(-1) for x in (logits, targets.logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compared(
    loss: Loss, student: torch.Tensor, targets: Targets, rule: Divergence, expected: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, object]:
    """Returns the errors of a loss on this rank's columns, with a different factor for each token in the backward.

    Shapes: ``student`` is [*TOKENS, padded vocabulary]; ``expected`` are the losses [*TOKENS], and their gradient
    [*TOKENS, vocabulary].
    """
    logits = student.chunk(torch.distributed.get_world_size(), -1)[torch.distributed.get_rank()]
    logits = logits.clone().requires_grad_()
    factors = torch.linspace(0.5, 2, 12).view(TOKENS)
    with CollectiveBytes() as moved, mock.patch.object(torch.distributed, "all_reduce", wraps=_ALL_REDUCE) as reduced:
        losses = loss(logits * 1, targets, rule)
        (gradient,) = torch.autograd.grad((losses * factors).sum(), logits)
    wanted = torch.nn.functional.pad(expected[1], (0, student.shape[-1] - expected[1].shape[-1]))
    mine = (wanted * factors.unsqueeze(-1)).chunk(torch.distributed.get_world_size(), -1)[torch.distributed.get_rank()]
    return {
        "loss": relative(losses.detach(), expected[0], 0.1),
        # Relative to the gradient of all ranks, because a rank that has only padding has no gradient to compare with.
        "gradient": relative(gradient, mine, float(wanted.abs().max())),
        "collectives": dict(moved.by_operation),
        "reductions": reduced.call_count,
    }


_ALL_REDUCE = torch.distributed.all_reduce


def local(targets: Targets) -> Targets:
    """Returns this rank's part of the targets."""
    if not isinstance(targets, DenseTargets):
        return targets
    return DenseTargets(targets.logits.chunk(torch.distributed.get_world_size(), -1)[torch.distributed.get_rank()])


def mixed(alpha: float, labels: torch.Tensor) -> Loss:
    return lambda logits, targets, rule: distillation(logits, labels, targets, rule, alpha).total


def main(directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    if not torch.cuda.is_available():
        cpu.install()
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    report: dict[str, dict] = {}
    draw = torch.Generator().manual_seed(5)
    student, teacher = 3 * torch.randn(2, *TOKENS, WIDTH * ranks, generator=draw)
    for where, vocab_size in VOCABULARIES.items():
        for temperature in (1.0, 2.0):
            for form, targets, rule in forms(teacher, Divergence(vocab_size, temperature), 9, draw):
                expected = by_definition(student, targets, rule)
                name = f"{form} {where} T={temperature:g}"
                report[name] = compared(ours, student, local(targets), rule, expected)
                # The chunks have five tokens.
                with mock.patch.object(module, "_CHUNK_ELEMENTS", 5 * WIDTH):
                    report[f"{name} in chunks"] = compared(ours, student, local(targets), rule, expected)
    labels = torch.randint(0, WIDTH * ranks, TOKENS, generator=draw)
    z = student.double().requires_grad_()
    entropy = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(TOKENS)
    slope = torch.autograd.grad(entropy.sum(), z)[0]
    targets, rule = DenseTargets(teacher), Divergence(WIDTH * ranks)
    apart = by_definition(student, targets, rule)
    for alpha in (0.0, 0.25, 1.0):
        expected = tuple((1 - alpha) * a.detach() + alpha * b for a, b in zip((entropy, slope), apart, strict=True))
        report[f"alpha={alpha:g}"] = compared(mixed(alpha, labels), student, local(targets), rule, expected)
    for mutant in (plain_all_reduce, all_gather_of_logits):
        report[mutant.__name__] = compared(mutant, student, local(targets), rule, apart)
    rank = torch.distributed.get_rank()
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
