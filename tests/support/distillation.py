# SPDX-License-Identifier: Apache-2.0
"""Distillation by its definition: over whole rows of logits, in float64, differentiated by autograd."""

from collections.abc import Iterator

import torch
from torch.nn.functional import kl_div

from bitcpm_megatron.objectives.distillation import Divergence
from bitcpm_megatron.objectives.targets import DenseTargets, SampledTargets, Targets, TopKTargets


def by_definition(logits: torch.Tensor, targets: Targets, rule: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses ``[...]`` and their gradient ``[..., V]`` without padding."""
    z = logits.detach().double()[..., : rule.vocab_size].requires_grad_()
    log_q = (z / rule.temperature).log_softmax(-1)
    if isinstance(targets, SampledTargets):
        p = targets.counts.double() / targets.draws
        losses = -(p * log_q.gather(-1, targets.ids.long())).sum(-1)
    elif isinstance(targets, TopKTargets):
        p, ids = targets.log_probabilities.double().exp(), targets.ids.long()
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        buckets = torch.cat((log_q.gather(-1, ids), rest), -1)
        # What is rounded to fp32 may have a sum above 1.
        p = torch.cat((p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)), -1)
        losses = kl_div(buckets, p, reduction="none").sum(-1)
    else:
        t = targets.logits.double()[..., : rule.vocab_size]
        log_p = (t / rule.temperature).log_softmax(-1)
        q, p = (log_p, log_q) if rule.reverse else (log_q, log_p)
        losses = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    losses = losses * rule.temperature**2
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


def top_k(teacher: torch.Tensor, k: int, temperature: float) -> TopKTargets:
    """Targets of a teacher's logits ``[..., V]`` without padding."""
    log_p, ids = (teacher.double() / temperature).log_softmax(-1).topk(k)
    return TopKTargets(ids.int(), log_p.float(), temperature)


def sampled(teacher: torch.Tensor, draws: int, temperature: float, generator: torch.Generator) -> SampledTargets:
    """Draws of a teacher's logits ``[..., V]`` without padding, with as many places as the vocabulary has ids."""
    p = (teacher.double() / temperature).softmax(-1).flatten(0, -2)
    drawn = torch.multinomial(p, draws, replacement=True, generator=generator)
    counts = torch.zeros(p.shape, dtype=torch.uint8).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.uint8))
    ids = torch.arange(p.shape[1]).int().where(counts > 0, 0)
    return SampledTargets(ids.view(teacher.shape), counts.view(teacher.shape), draws, temperature)


def forms(
    teacher: torch.Tensor, rule: Divergence, k: int, generator: torch.Generator
) -> Iterator[tuple[str, Targets, Divergence]]:
    """All that a teacher with padded logits ``[..., V]`` can say, by name."""
    real, temperature = teacher[..., : rule.vocab_size], rule.temperature
    yield "forward", DenseTargets(teacher), rule
    yield "reverse", DenseTargets(teacher), Divergence(rule.vocab_size, temperature, reverse=True)
    yield "top-k", top_k(real, k, temperature), rule
    yield "sampled", sampled(real, 12, temperature, generator), rule


def relative(found: torch.Tensor, expected: torch.Tensor, least: float) -> float:
    """The largest difference over the largest element, or over ``least``; infinite where something isn't finite."""
    error = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=least))
    return error if bool(found.isfinite().all()) else float("inf")
