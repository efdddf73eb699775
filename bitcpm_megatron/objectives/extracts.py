# SPDX-License-Identifier: Apache-2.0
"""Extracts of a teacher's logits that are small enough to keep: draws, or the likeliest ids.

The vocabulary is split over ranks; the logits are not gathered, and every rank gets the whole of what is kept. Tokens
are taken in chunks, as by the losses of :mod:`~bitcpm_megatron.objectives.distillation`. In shapes, V is the padded
vocabulary size and TP the number of ranks; T is the temperature.
"""

import torch
from torch.distributed import ProcessGroup, ReduceOp

from .distillation import Shard, chunks


@torch.no_grad()
def draws(
    logits: torch.Tensor, uniform: torch.Tensor, vocab_size: int, temperature: float, group: ProcessGroup
) -> torch.Tensor:
    """Draws ids with replacement from softmax(logits / T), by the inverse of its cumulative sums.

    Each number finds its rank by the sums of all ranks, and its id within the rank's own sums: the same numbers give
    the same ids over any number of ranks, except for the rounding of sums.

    Args:
        logits: bf16, fp16 or fp32 ``[..., V / TP]``, the columns of this rank.
        uniform: the random numbers, fp32 ``[..., draws]``, from 0 to below 1, the same on every rank.
        vocab_size: the number of ids without padding; no other is drawn.
        temperature: the temperature T.
        group: the ranks that the vocabulary is split over, in equal parts by rank.

    Returns:
        The drawn ids, int32 ``[..., draws]``, the same on every rank.

    Raises:
        ValueError: if the logits of a token are not finite; on every rank alike.
    """
    rows, numbers = logits.flatten(0, -2), uniform.flatten(0, -2)
    shard = Shard(rows.shape[1] * group.rank(), rows.shape[1], vocab_size, group)
    found = torch.empty(numbers.shape, dtype=torch.int32, device=logits.device)
    for chunk in chunks(rows):
        below = _weights(shard.copied(rows[chunk], torch.float32), temperature, shard)[0].cumsum(-1)
        sums = below.new_zeros(group.size(), len(below))
        sums[group.rank()] = below[:, -1]
        bounds = shard.reduced(sums).cumsum(0).t().contiguous()
        require_finite(bounds[:, -1])
        wanted = numbers[chunk] * bounds[:, -1:]
        # Rounding must not select a rank or a column of the padding.
        owner = torch.searchsorted(bounds, wanted, right=True).clamp_(max=(vocab_size - 1) // shard.width)
        before = bounds[:, group.rank() - 1 : group.rank()] if group.rank() else torch.zeros_like(bounds[:, :1])
        column = torch.searchsorted(below, wanted - before, right=True).clamp_(max=shard.real - 1)
        mine = owner == group.rank()
        found[chunk] = shard.reduced((column + shard.start).where(mine, 0).int())
    return found.view(uniform.shape)


@torch.no_grad()
def likeliest(
    logits: torch.Tensor, k: int, vocab_size: int, temperature: float, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k ids of each token with the largest softmax(logits / T), and the logarithms of the softmax there.

    Args:
        logits: bf16, fp16 or fp32 ``[..., V / TP]``, the columns of this rank.
        k: the number of ids per token, below the vocabulary size.
        vocab_size: the number of ids without padding; no other is among the results.
        temperature: the temperature T.
        group: the ranks that the vocabulary is split over, in equal parts by rank.

    Returns:
        The ids, int32 ``[..., k]``, the likeliest first, and the logarithms, fp32 ``[..., k]``, NaN for a token whose
        logits are not finite; the same on every rank.
    """
    rows = logits.flatten(0, -2)
    shard = Shard(rows.shape[1] * group.rank(), rows.shape[1], vocab_size, group)
    ids = torch.empty(len(rows), k, dtype=torch.int32, device=logits.device)
    log_p = torch.empty(len(rows), k, device=logits.device)
    for chunk in chunks(rows):
        weights, below = _weights(shard.copied(rows[chunk], torch.float32), temperature, shard)
        whole = shard.reduced(weights.sum(-1, keepdim=True))
        best, columns = below.topk(min(k, shard.width), -1)
        candidates, names = (_gathered(part, group) for part in (best, columns + shard.start))
        best, places = candidates.topk(k, -1)
        ids[chunk] = names.gather(-1, places).int()
        log_p[chunk] = best - whole.log()
    return ids.view(*logits.shape[:-1], k), log_p.view(*logits.shape[:-1], k)


@torch.no_grad()
def log_likelihoods(
    logits: torch.Tensor, ids: torch.Tensor, vocab_size: int, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logarithm of softmax(logits) at an id of each token, and whether no other id has a larger one.

    Args:
        logits: bf16, fp16 or fp32 ``[..., V / TP]``, the columns of this rank.
        ids: the ids, int64 ``[...]``, below ``vocab_size``.
        vocab_size: the number of ids without padding; no other has a share in the softmax.
        group: the ranks that the vocabulary is split over, in equal parts by rank.

    Returns:
        The logarithms, fp32 ``[...]``, NaN for a token whose logits are not finite, and bool ``[...]``, true only for
        the least id if several have the largest logit; the same on every rank.
    """
    rows, wanted = logits.flatten(0, -2), ids.flatten()
    shard = Shard(rows.shape[1] * group.rank(), rows.shape[1], vocab_size, group)
    log_p = torch.empty(len(rows), device=logits.device)
    likeliest_ids = torch.empty_like(wanted)
    for chunk in chunks(rows):
        weights, below = _weights(shard.copied(rows[chunk], torch.float32), 1.0, shard)
        columns, here = shard.columns(wanted[chunk])
        mine = below.gather(-1, columns.unsqueeze(-1)).squeeze(-1).where(here, 0)
        whole, found = shard.reduced(torch.stack((weights.sum(-1), mine)))
        log_p[chunk] = found - whole.log()
        best, column = below.max(-1)
        likeliest_ids[chunk] = shard.reduced((column + shard.start).where(best == 0, vocab_size), ReduceOp.MIN)
    return log_p.view(ids.shape), (likeliest_ids == wanted).view(ids.shape)


def _weights(z: torch.Tensor, temperature: float, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the exponentials of z / T below the maximum over all ranks, and their logarithms, which overwrite z."""
    below = z.sub_(shard.reduced(z.amax(-1, keepdim=True), ReduceOp.MAX)).div_(temperature)
    return below.exp(), below


def require_finite(found: torch.Tensor) -> None:
    """Waits for the device, and raises a ValueError if a result from a teacher's logits is not finite."""
    if not found.isfinite().all():
        raise ValueError("the teacher's logits are not finite: its weights are damaged, or it needs another precision")


def _gathered(part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Gathers a part ``[n, k]`` from all ranks, as ``[n, k x ranks]``."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part, group=group)
    return torch.cat(parts, -1)
