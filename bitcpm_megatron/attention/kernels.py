# SPDX-License-Identifier: Apache-2.0
"""Causal attention by the kernels of torch and torch_npu, document by document; T x T scores only with dropout.

Shapes: d is the size of a head, T the tokens of a packed row; keys and values have ``groups`` heads. With a window of W
a token attends to itself and to the W tokens before it. If there are fewer queries than keys, the queries are those of
the last tokens: the earlier ones were computed before, and their keys and values were kept.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

# The number of queries per call with a mask, whose shape is this by (this + W), or this by all keys.
_MASKED_BLOCK = 512
_COMPRESSED = 2048


@dataclass(frozen=True)
class Weighting:
    """The rule of how much a token attends to which others.

    Attributes:
        scale: the multiplier of the scores, before the softmax.
        window: the number of tokens before itself that a token sees; None for all.
        dropout: the probability with which a weight is dropped.
    """

    scale: float
    window: int | None = None
    dropout: float = 0.0


def attend_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """Computes attention within rows of one length.

    Args:
        query: the queries ``[length, rows, heads, d]``, of the last tokens.
        key: the keys ``[all, rows, groups, d]`` with all >= length; query head i attends with group
            ``i // (heads / groups)``.
        value: the values, shaped like ``key``.
        weighting: how the tokens of a row attend to each other.

    Returns:
        The weighted values ``[length, rows, heads, d]``.
    """
    if query.device.type == "npu":
        return _rows_on_npu(query, key, value, weighting)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return _sdpa(query, key, value, weighting).permute(2, 0, 1, 3)


def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weighting: Weighting,
    cumulative: torch.Tensor,
) -> torch.Tensor:
    """Computes attention within the documents of a packed row, as :func:`attend_rows` does within rows.

    Args:
        query: the queries ``[T, heads, d]``.
        key: the keys ``[T, groups, d]``.
        value: the values, shaped like ``key``.
        weighting: how the tokens of a document attend to each other.
        cumulative: the bounds of the documents, int32 ``[documents + 1]``, from 0 to T, on the CPU.

    Returns:
        The weighted values ``[T, heads, d]``.
    """
    if query.device.type == "npu":
        return _on_npu(query, key, value, cumulative, weighting)
    if _flash_takes(query, weighting):
        return _varlen(query, key, value, cumulative, weighting)
    lengths = cumulative.diff().tolist()
    attended = [
        attend_rows(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), weighting).squeeze(1)
        for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(attended)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """Computes attention of queries ``[rows, heads, length, d]`` with keys and values ``[rows, groups, all, d]``."""
    length, window = query.shape[2], weighting.window
    earlier = key.shape[2] - length
    grouped = key.shape[1] != query.shape[1]
    call = functools.partial(
        scaled_dot_product_attention, dropout_p=weighting.dropout, scale=weighting.scale, enable_gqa=grouped
    )
    if earlier == 0 and (window is None or window >= length - 1):
        return call(query, key, value, is_causal=True)
    attended = []
    for start in range(earlier, earlier + length, _MASKED_BLOCK):
        end = min(start + _MASKED_BLOCK, earlier + length)
        first = 0 if window is None else max(0, start - window)
        back = torch.arange(start, end, device=query.device)[:, None] - torch.arange(first, end, device=query.device)
        seen = back >= 0 if window is None else (back >= 0) & (back <= window)
        asking = query[:, :, start - earlier : end - earlier]
        attended.append(call(asking, key[:, :, first:end], value[:, :, first:end], attn_mask=seen))
    return torch.cat(attended, 2)


def _flash_takes(query: torch.Tensor, weighting: Weighting) -> bool:
    """Returns whether torch's flash attention over cumulative lengths computes this, by the checks in its CUDA code."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and not weighting.dropout
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _has_varlen()
    )


@functools.lru_cache(maxsize=1)
def _has_varlen() -> bool:
    """Returns whether this torch has flash attention over cumulative lengths with every option that is used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, weighting: Weighting
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cumulative.diff().max())
    cumulative = cumulative.to(query.device, non_blocking=True)
    attended = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cumulative,
        cumulative,
        longest,
        longest,
        scale=weighting.scale,
        window_size=(-1 if weighting.window is None else weighting.window, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(attended, torch.Tensor)  # it would be a pair if more outputs were requested
    return attended


def _rows_on_npu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    length, rows = query.shape[:2]
    bounds, of_keys = (torch.arange(rows + 1) * len(x) for x in (query, key))
    query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    return _on_npu(query, key, value, bounds, weighting, of_keys).unflatten(0, (rows, length)).transpose(0, 1)


def _on_npu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    weighting: Weighting,
    of_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Calls ``torch_npu.npu_fusion_attention`` in layout TND, whose cumulative lengths have no leading 0.

    ``of_keys`` are the cumulative lengths of the keys, if they differ from those of the queries.
    """
    import torch_npu

    ends, key_ends = (x[1:].tolist() for x in (cumulative, cumulative if of_keys is None else of_keys))
    # Modes 3 (causal) and 4 (band) of the operator take one compressed mask for all lengths. They align its diagonal to
    # the lower right corner: the last query is that of the last key.
    mask = _compressed_mask(query.device)
    banded = {"sparse_mode": 3}
    if weighting.window is not None:
        banded = {"sparse_mode": 4, "pre_tockens": weighting.window, "next_tockens": 0}
    return torch_npu.npu_fusion_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        query.shape[1],
        "TND",
        atten_mask=mask,
        scale=weighting.scale,
        keep_prob=1.0 - weighting.dropout,
        actual_seq_qlen=ends,
        actual_seq_kvlen=key_ends,
        **banded,
    )[0]


@functools.lru_cache(maxsize=2)
def _compressed_mask(device: torch.device) -> torch.Tensor:
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)
