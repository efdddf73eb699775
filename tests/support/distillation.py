# SPDX-License-Identifier: Apache-2.0
"""Distillation by its definition: over whole rows of logits, in float64, differentiated by autograd."""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch.nn.functional import cross_entropy, kl_div, pad

from bitcpm_megatron import QuantizerConfig, fake_quantize
from bitcpm_megatron.objectives.distillation import Divergence
from bitcpm_megatron.objectives.targets import DenseTargets, SampledTargets, Targets, TopKTargets
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.training.checkpoint import trained_model
from bitcpm_megatron.training.flags import arguments_of


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


def in_float64(checkpoint: Path, padded_vocab_size: int) -> GPTModel:
    """The model of a checkpoint on one rank, with quantized weights in the place of those that are quantized.

    They are plain parameters: their gradients are those that go straight through to the latent weights.
    """
    args, record = arguments_of(checkpoint, 1), QuantizerRecord.read(checkpoint)
    args.ternary = False
    # The weights that are drawn are written over.
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = trained_model(args, checkpoint, padded_vocab_size).bare[0]
    for name, said in ({} if record is None else record.modules).items():
        weight = model.get_submodule(name).weight
        weight.data = fake_quantize(weight, QuantizerConfig(group_size=said["group_size"]))
    return model.double().requires_grad_()


class WholeStep:
    """What a step on some samples has to be, in float64 over whole logits.

    Args:
        student: from :func:`in_float64`.
        logits: of the teacher ``[samples, seq_length, V]``.
        batch: all samples of the step.
        vocab_size: ids without padding.
    """

    def __init__(
        self, student: GPTModel, logits: torch.Tensor, batch: dict[str, torch.Tensor], vocab_size: int
    ) -> None:
        self._student, self._teacher, self._vocab_size = student, logits, vocab_size
        self._logits = student(batch["tokens"], batch["position_ids"], None)
        self._share = batch["loss_mask"].double() / batch["loss_mask"].double().sum()
        losses = cross_entropy(self._logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        self._entropy = losses.view_as(self._share)

    def expected(self, alpha: float, temperature: float, k: int | None) -> tuple[float, float, dict[str, torch.Tensor]]:
        """Means over the tokens that count: cross entropy, divergence, and the gradients of their mixture by name."""
        real = self._teacher[..., : self._vocab_size]
        targets = DenseTargets(real) if k is None else top_k(real, k, temperature)
        apart, slope = by_definition(self._logits, targets, Divergence(self._vocab_size, temperature))
        slope = pad(slope, (0, self._logits.shape[-1] - self._vocab_size))
        (of_entropy,) = torch.autograd.grad(self._entropy.sum(), self._logits, retain_graph=True)
        upstream = ((1 - alpha) * of_entropy + alpha * slope) * self._share.unsqueeze(-1)
        names, weights = zip(*self._student.named_parameters(), strict=True)
        gradients = torch.autograd.grad(self._logits, weights, upstream, retain_graph=True)
        entropy, divergence = (float((each * self._share).sum()) for each in (self._entropy, apart))
        return entropy, divergence, dict(zip(names, gradients, strict=True))
