# SPDX-License-Identifier: Apache-2.0
"""Ulysses context parallelism (Jacobs et al. 2023, arXiv 2309.14509): all-to-all from tokens to heads, and back.

Every rank starts with all heads of its part of the tokens, and attends with its part of the heads over all tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup

from .documents import by_rank, in_order

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def over_heads(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: ProcessGroup
) -> torch.Tensor:
    """Computes attention over the tokens of all ranks of a group.

    T is the number of tokens of the whole row, N the number of ranks, and d the size of a head.

    Args:
        attend: attention over a whole row: query ``[T, heads, d]``, key and value ``[T, groups, d]`` -> like query.
        query: the queries ``[T / N, heads, d]`` of this rank; N must divide the heads.
        key: the keys ``[T / N, groups, d]`` of this rank; if N does not divide the groups, their heads are repeated, so
            that each rank has its own.
        value: the values, shaped like ``key``.
        group: the ranks that share the tokens of the row.

    Returns:
        The weighted values ``[T / N, heads, d]``.
    """
    ranks, heads, groups = group.size(), query.shape[1], key.shape[1]
    if groups % ranks:
        repeats = ranks // groups if ranks % groups == 0 else heads // groups
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]
    # One exchange serves all three: rank r gets the r-th part of the heads of each.
    sent = torch.cat(parts, 2).transpose(0, 1)
    received = in_order(_Exchange.apply(sent, group).flatten(0, 1), ranks)
    attended = attend(*received.split([part.shape[2] for part in parts], 1))
    back = _Exchange.apply(by_rank(attended, ranks).unflatten(0, (ranks, -1)), group)
    return back.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """All-to-all of ``[N, ...]``, part r to rank r of N; its gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0], ctx.group), None
