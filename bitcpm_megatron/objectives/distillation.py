# SPDX-License-Identifier: Apache-2.0
r"""Knowledge distillation: a loss per token against a teacher's targets, over a vocabulary split over ranks.

With the student's logits z and the teacher's t, q = softmax(z / T) and p = softmax(t / T) at the temperature T. All
losses have the factor T^2, so that the size of their gradient does not fall with T; gradients are with respect to z.
K are the k ids that top-k targets keep. In shapes, V is the padded vocabulary size, TP the number of tensor-parallel
ranks, and ``[...]`` are the axes of the tokens.

    targets      loss                                                gradient
    dense        T^2 KL(p || q) = T^2 sum p (ln p - ln q)            T (q - p)
    dense,       T^2 KL(q || p) = T^2 sum q (ln q - ln p)            T q (ln q - ln p - KL(q || p))
      reverse
    top-k        T^2 [sum_K p (ln p - ln q) + p_r (ln p_r - ln q_r)] T (q - p) in K,  T q (1 - p_r / q_r) outside
    sampled      T^2 [- sum p^ ln q],  p^ = counts / draws           T (q - p^)

For the reverse divergence, d q_i / d z_j = q_i (delta_ij - q_j) / T, and sum_i q_i d ln q_i / d z_j = 0. For top-k,
p_r = 1 - sum_K p and q_r is the sum of q outside K: the loss is the KL between k + 1 buckets. It is at most the dense
one, 0 if q = p, and does not depend on how the rest is distributed: the gradient there moves all of q_r alike. The mean
over draws of the sampled loss is T^2 [KL(p || q) + H(p)] with the teacher's entropy H(p), which has no gradient.

No logits are gathered: tokens are taken in chunks, and a chunk needs an all-reduce of maxima and one of packed sums.
With maxima mz, mt of z / T, t / T and sums Zs, Zt of the exponentials below them, KL(p || q) = A / Zt + ln(Zs / Zt),
where A = sum e^(t/T - mt) ((t/T - mt) - (z/T - mz)): if student and teacher are equal, it is 0 to the last bit. q_r is
computed from a sum over the ids outside K below their own maximum, never as 1 - sum_K q, so that it is as exact as q in
fp32 even if it is 1e-30. p_r is read as 1 - sum_K p, with the rounding of the targets that
:class:`~bitcpm_megatron.objectives.targets.TopKTargets` states.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from .targets import DenseTargets, SampledTargets, Targets, TopKTargets

# The number of elements of one chunk of logits; a loss has at most four fp32 tensors of this size at a time.
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Divergence:
    """The measure of how far a student is from its teacher.

    Attributes:
        vocab_size: the number of ids without padding. Columns at or beyond it are not read, and have a gradient of 0.
        temperature: T, by which both divide their logits.
        reverse: whether it is KL(student || teacher) instead of KL(teacher || student).

    Raises:
        ValueError: if the temperature is not finite and above 0.
    """

    vocab_size: int
    temperature: float = 1.0
    reverse: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"a temperature of {self.temperature} is not possible: use a number above 0")


class Losses(NamedTuple):
    """The losses of all tokens, fp32 ``[...]`` like the tokens; only ``total`` has a gradient.

    ``divergence`` is None if alpha is 0.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor | None


def distillation(
    logits: torch.Tensor, labels: torch.Tensor, targets: Targets, rule: Divergence, alpha: float
) -> Losses:
    """Returns (1 - alpha) cross entropy + alpha divergence of each token; masks and means are left to the caller.

    The cross entropy is megatron-core's, over the padded vocabulary as in a run without a teacher. For fp32 logits it
    overwrites the logits, so that the caller cannot use them afterwards, unless alpha is 1.

    Args:
        logits: the student's logits, bf16, fp16 or fp32 ``[..., V / TP]``, the columns of this tensor-parallel rank.
        labels: the ids of the next tokens, int64 ``[...]``, in the order of the logits.
        targets: the teacher's targets of the same tokens; not read if alpha is 0.
        rule: the divergence to use.
        alpha: the share of the divergence. If it is 1, the cross entropy is computed without a gradient.

    Raises:
        ValueError: if alpha is outside 0 to 1, or :func:`divergence` raises it.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not possible: use 0 (cross entropy alone) to 1 (teacher alone)")
    if alpha == 0:
        entropy = vocab_parallel_cross_entropy(logits, labels)
        return Losses(entropy, entropy.detach(), None)
    # The divergence comes first, because the cross entropy may overwrite the logits.
    apart = divergence(logits, targets, rule, parallel_state.get_tensor_model_parallel_group())
    if alpha == 1:
        return Losses(apart, _cross_entropy(logits.detach(), labels), apart.detach())
    entropy = vocab_parallel_cross_entropy(logits, labels)
    return Losses((1 - alpha) * entropy + alpha * apart, entropy.detach(), apart.detach())


def divergence(logits: torch.Tensor, targets: Targets, rule: Divergence, group: ProcessGroup) -> torch.Tensor:
    """Computes the divergence of each token, by the formula for its kind of targets in the module's docstring.

    Args:
        logits: the student's finite logits, bf16, fp16 or fp32 ``[..., V / TP]``. They are not kept for the backward
            pass, which can run once: it needs only their gradient, which is saved in bf16 for bf16 logits, else in
            fp32, since in fp16 small probabilities would vanish before a loss scale multiplies them.
        targets: the teacher's targets of the same tokens.
        rule: the vocabulary, temperature and direction.
        group: the ranks that the vocabulary is split over, in equal parts by rank.

    Returns:
        fp32 ``[...]``, in nats times T^2; its rounding is some 2e-7 of it, or of T^2 if the divergence is small. NaN
        for a token whose targets are malformed: to raise an error instead would have to wait for the device.

    Raises:
        ValueError: if the targets have other tokens or another vocabulary, were written at another temperature, or
            cannot serve the reverse divergence.
    """
    _check(logits, targets, rule, group)
    return _Loss.apply(logits, targets, rule, group)


def _check(logits: torch.Tensor, targets: Targets, rule: Divergence, group: ProcessGroup) -> None:
    padded = logits.shape[-1] * group.size()
    if not 0 < rule.vocab_size <= padded:
        raise ValueError(f"logits of {padded} ids (padded) do not hold a vocabulary of {rule.vocab_size}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets of {list(targets.shape)} tokens for logits of {list(logits.shape[:-1])}")
    if isinstance(targets, DenseTargets):
        if targets.logits.shape != logits.shape:
            raise ValueError(
                f"the teacher has {targets.logits.shape[-1]} columns per rank and the student {logits.shape[-1]}: "
                "build the teacher with the student's padded vocabulary size"
            )
        return
    if targets.temperature != rule.temperature:
        raise ValueError(
            f"the targets were written at a temperature of {targets.temperature} and hold no other: distil at it, or "
            f"write targets at {rule.temperature}"
        )
    if rule.reverse:
        # Its weights are q, even for ids that the targets lack, or for a p_r that is only rounding.
        raise ValueError(
            "the reverse divergence needs the teacher's probability of every id, which sampled and top-k targets lack: "
            "use a teacher that runs along, or the forward divergence"
        )
    if isinstance(targets, TopKTargets) and targets.ids.shape[-1] >= rule.vocab_size:
        raise ValueError(f"top-{targets.ids.shape[-1]} targets of {rule.vocab_size} ids leave no rest: use fewer")


class _Loss(torch.autograd.Function):
    """The loss of all tokens, chunk by chunk; the forward pass also computes the gradient, since it has all inputs."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: Targets, rule: Divergence, group: ProcessGroup
    ) -> torch.Tensor:
        rows, said = logits.flatten(0, -2), targets.flatten()
        shard = Shard(rows.shape[1] * group.rank(), rows.shape[1], rule.vocab_size, group)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(rows, dtype=torch.bfloat16 if logits.dtype == torch.bfloat16 else dtype)
        losses = rows.new_empty(len(rows), dtype=dtype)
        for chunk in chunks(rows):
            z, part = shard.copied(rows[chunk], dtype), said[chunk]
            losses[chunk], gradient[chunk] = _FORMULAS[type(part)](z, part, rule, shard)
            if not isinstance(part, DenseTargets):
                losses[chunk].masked_fill_(part.malformed(rule.vocab_size), math.nan)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return losses.mul_(rule.temperature**2).view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        factors = grads[0].flatten().unsqueeze(-1)
        # In place, because a second copy would be as large as the logits. In chunks, because a product of two dtypes
        # makes copies.
        for chunk in chunks(gradient):
            gradient[chunk].mul_(factors[chunk])
        return gradient.to(ctx.dtype).view(*grads[0].shape, -1), None, None, None


@dataclass(frozen=True)
class Shard:
    """The columns of a rank: ids from ``start`` on, of which those at or beyond ``vocab_size`` are padding."""

    start: int
    width: int
    vocab_size: int
    group: ProcessGroup

    @property
    def real(self) -> int:
        """The number of columns before the padding."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    def copied(self, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns a copy that formulas may overwrite, in which padding has no weight."""
        copy = logits.to(dtype, copy=True)
        copy[:, self.real :] = -math.inf
        return copy

    def reduced(self, values: torch.Tensor, op: Any = ReduceOp.SUM) -> torch.Tensor:
        """Reduces ``values`` over all ranks in place, and returns them."""
        torch.distributed.all_reduce(values, op, group=self.group)
        return values

    def columns(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the columns of ids, 0 for ids of other ranks, and whether each id belongs to this rank."""
        columns = ids.long() - self.start
        here = (columns >= 0) & (columns < self.width)
        return columns.where(here, 0), here


# Each formula takes a chunk of z [n, V / TP] in fp32, n tokens, which it may overwrite. It returns the loss [n] without
# the factor T^2 and the gradient [n, V / TP] of the loss with it.


def _dense(z: torch.Tensor, targets: DenseTargets, rule: Divergence, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes KL(of || against) and its gradient with respect to the student, which is either of the two."""
    t = shard.copied(targets.logits, z.dtype)
    for logits, maximum in zip((z, t), shard.reduced(torch.stack((z.amax(-1), t.amax(-1))), ReduceOp.MAX), strict=True):
        logits.sub_(maximum.unsqueeze(-1)).div_(rule.temperature)
    of, against = (z, t) if rule.reverse else (t, z)
    weight = of.exp()
    difference = of.sub_(against)
    difference[:, shard.real :] = 0  # in the padding it is the difference of two infinities
    other = against.exp_()
    sums = shard.reduced(torch.stack((weight.sum(-1), other.sum(-1), (weight * difference).sum(-1))))
    whole, whole_other, total = sums.unsqueeze(-1)
    mean = total / whole
    weight.div_(whole)
    gradient = difference.sub_(mean).mul_(weight) if rule.reverse else other.div_(whole_other).sub_(weight)
    return (mean + (whole_other / whole).log()).squeeze(-1), gradient.mul_(rule.temperature)


def _top_k(z: torch.Tensor, targets: TopKTargets, rule: Divergence, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the KL between k + 1 buckets; the last bucket's gradient goes to the ids in it by their shares."""
    columns, here = shard.columns(targets.ids)
    kept = z.gather(1, columns).where(here, 0.0)
    # The additions are exact, even if columns repeat because their ids belong to other ranks.
    rest = z.scatter_add_(1, columns, torch.where(here, -math.inf, 0.0).to(z.dtype))
    maximum = shard.reduced(rest.amax(-1, keepdim=True), ReduceOp.MAX)
    share = rest.sub_(maximum).div_(rule.temperature).exp_()
    sums = shard.reduced(torch.cat((kept, share.sum(-1, keepdim=True)), -1))
    kept, whole = sums[:, :-1], sums[:, -1:]
    log_q = torch.cat(((kept - maximum) / rule.temperature, whole.log()), -1).log_softmax(-1)
    log_p = targets.log_probabilities.to(z.dtype)
    remaining = -torch.expm1(log_p.logsumexp(-1, keepdim=True).clamp(max=0.0))
    # If rounding has put the sum above 1, nothing remains, and p is renormalized.
    p = torch.cat((log_p, remaining.log()), -1).softmax(-1)
    loss = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    of_bucket = (log_q.exp() - p).mul_(rule.temperature)
    gradient = share.mul_(of_bucket[:, -1:] / whole)
    return loss, gradient.scatter_add_(1, columns, of_bucket[:, :-1].where(here, 0.0))


def _sampled(
    z: torch.Tensor, targets: SampledTargets, rule: Divergence, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the cross entropy with the frequencies of the draws."""
    columns, here = shard.columns(targets.ids)
    p = (targets.counts.to(z.dtype) / targets.draws).where(here, 0.0)
    maximum = shard.reduced(z.amax(-1, keepdim=True), ReduceOp.MAX)
    z.sub_(maximum).div_(rule.temperature)
    # A place without a count would contribute 0 times the logit of a column that may be padding, minus infinity.
    expected = (p * z.gather(1, columns)).where(p > 0, 0.0).sum(-1)
    q = z.exp_()
    whole, expected = shard.reduced(torch.stack((q.sum(-1), expected)))
    gradient = q.div_(whole.unsqueeze(-1)).scatter_add_(1, columns, -p)
    return whole.log() - expected, gradient.mul_(rule.temperature)


_FORMULAS: dict[type[Targets], Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    DenseTargets: _dense,
    TopKTargets: _top_k,
    SampledTargets: _sampled,
}


@torch.no_grad()
def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the loss of each token without a gradient, a copy of all logits in fp32, or a write into them."""
    rows, wanted = logits.flatten(0, -2), labels.flatten()
    found = [
        vocab_parallel_cross_entropy(rows[chunk].to(torch.float32, copy=True), wanted[chunk]) for chunk in chunks(rows)
    ]
    return torch.cat(found).view(labels.shape)


def chunks(rows: torch.Tensor) -> Iterator[slice]:
    """Yields slices of rows with some millions of elements each; the same on every rank, since all have equal parts."""
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
