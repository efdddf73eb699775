# SPDX-License-Identifier: Apache-2.0
"""Reference distillation by its definition: over whole rows of logits, in float64, differentiated by autograd.

Shapes: ``V`` is the number of ids of the vocabulary, without padding unless stated.
"""

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
    """Returns the losses ``[...]`` for logits with padding, and their gradient ``[..., V]`` without padding."""
    z = logits.detach().double()[..., : rule.vocab_size].requires_grad_()
    log_q = (z / rule.temperature).log_softmax(-1)
    if isinstance(targets, SampledTargets):
        p = targets.counts.double() / targets.draws
        losses = -(p * log_q.gather(-1, targets.ids.long())).sum(-1)
    elif isinstance(targets, TopKTargets):
        p, ids = targets.log_probabilities.double().exp(), targets.ids.long()
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        buckets = torch.cat((log_q.gather(-1, ids), rest), -1)
        # Probabilities rounded to fp32 may have a sum above 1.
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
    """Returns the top-k targets of a teacher's logits ``[..., V]`` without padding."""
    log_p, ids = (teacher.double() / temperature).log_softmax(-1).topk(k)
    return TopKTargets(ids.int(), log_p.float(), temperature)


def sampled(teacher: torch.Tensor, draws: int, temperature: float, generator: torch.Generator) -> SampledTargets:
    """Returns sampled targets of a teacher's logits ``[..., V]`` without padding, with V places per token."""
    p = (teacher.double() / temperature).softmax(-1).flatten(0, -2)
    drawn = torch.multinomial(p, draws, replacement=True, generator=generator)
    counts = torch.zeros(p.shape, dtype=torch.uint8).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.uint8))
    ids = torch.arange(p.shape[1]).int().where(counts > 0, 0)
    return SampledTargets(ids.view(teacher.shape), counts.view(teacher.shape), draws, temperature)


def forms(
    teacher: torch.Tensor, rule: Divergence, k: int, generator: torch.Generator
) -> Iterator[tuple[str, Targets, Divergence]]:
    """Yields every kind of target of a teacher with padded logits ``[..., padded V]``: name, targets, rule."""
    real, temperature = teacher[..., : rule.vocab_size], rule.temperature
    yield "forward", DenseTargets(teacher), rule
    yield "reverse", DenseTargets(teacher), Divergence(rule.vocab_size, temperature, reverse=True)
    yield "top-k", top_k(real, k, temperature), rule
    yield "sampled", sampled(real, 12, temperature, generator), rule


def relative(found: torch.Tensor, expected: torch.Tensor, least: float) -> float:
    """Returns the largest difference over the largest element, or over ``least``; inf if an element is not finite."""
    error = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=least))
    return error if bool(found.isfinite().all()) else float("inf")


def in_float64(checkpoint: Path, padded_vocab_size: int) -> GPTModel:
    """Returns the model of a checkpoint in float64 on one rank, with quantized weights instead of the latent ones.

    They are plain parameters: their gradients are those that go straight through to the latent weights.
    """
    args, record = arguments_of(checkpoint, 1), QuantizerRecord.read(checkpoint)
    args.ternary = False
    # The seed is needed for drawing initial weights, which are then overwritten.
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = trained_model(args, checkpoint, padded_vocab_size).bare[0]
    for name, said in ({} if record is None else record.modules).items():
        weight = model.get_submodule(name).weight
        weight.data = fake_quantize(weight, QuantizerConfig(group_size=said["group_size"]))
    return model.double().requires_grad_()


class WholeStep:
    """The expected result of a step on some samples, in float64 over whole logits.

    Args:
        student: the student from :func:`in_float64`.
        logits: the logits of the teacher ``[samples, seq_length, padded V]``.
        batch: all samples of the step.
        vocab_size: the number of ids without padding.
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
        """Returns the cross entropy, the divergence and the gradients of their mixture by name; means over the tokens
        that count."""
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
