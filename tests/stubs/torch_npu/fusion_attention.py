# SPDX-License-Identifier: Apache-2.0
"""``torch_npu.npu_fusion_attention`` with layouts SBH and TND, as documented; what is not allowed raises an error."""

import torch

# In sparse modes 2, 3 and 4, the operator reads one upper triangle of this size, whatever the length of sequences is.
_COMPRESSED = 2048


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2**31 - 1,
    next_tockens: int = 2**31 - 1,
    inner_precise: int = 0,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Computes attention over ``[sequence, batch, heads * size]`` (SBH) or packed ``[tokens, heads, size]`` (TND).

    ``size`` is the number of channels per head, ``tokens`` the number of tokens of all packed sequences. Keys and
    values may have fewer heads than queries (grouped queries). Sparse mode 0 takes the mask as it is (True hides).
    Modes 2 and 3 are causal; mode 4 is the band from ``pre_tockens`` before the diagonal to ``next_tockens`` after it,
    here 0. Modes 2 to 4 require the compressed mask. In modes 3 and 4, the diagonal ends at the last query and the last
    key, even if there are fewer queries than keys. In TND, tokens attend only to their own sequence;
    ``actual_seq_qlen`` and ``actual_seq_kvlen`` are the ends of the sequences, without a 0 in front.

    Returns:
        The result, and the softmax's maximum and sum ``[batch, heads, sequence, 8]`` or ``[tokens, heads, 8]``, both
        constant along the last axis.
    """
    packed = input_layout == "TND"
    odd = {
        "input_layout": input_layout not in ("SBH", "TND"),
        "pse": pse is not None,
        "padding_mask": padding_mask is not None,
        "keep_prob": keep_prob != 1.0,
        "sparse_mode": sparse_mode not in ((2, 3, 4) if packed else (0, 2, 3, 4)),
        "actual_seq_qlen": (actual_seq_qlen is not None) != packed or (actual_seq_kvlen is not None) != packed,
        "fewer queries than keys": actual_seq_qlen != actual_seq_kvlen and sparse_mode not in (3, 4),
        "next_tockens": sparse_mode == 0 and atten_mask is None and min(pre_tockens, next_tockens) < key.shape[0],
        "a band that is not causal": sparse_mode == 4 and (next_tockens != 0 or pre_tockens < 0),
    }
    if any(odd.values()):
        names = ", ".join(name for name, is_odd in odd.items() if is_odd)
        raise NotImplementedError(f"the CPU stand-in for torch_npu does not model npu_fusion_attention with {names}")
    if sparse_mode != 0:
        triangle = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool).triu(1)
        if atten_mask is None or not torch.equal(atten_mask, triangle):
            raise ValueError(f"sparse mode {sparse_mode} wants the upper triangle {_COMPRESSED} x {_COMPRESSED}")
    before = pre_tockens if sparse_mode == 4 else None
    if not packed:
        size = query.shape[-1] // head_num
        q, k, v = (t.reshape(*t.shape[:2], -1, size).permute(1, 2, 0, 3) for t in (query, key, value))
        out, *statistics = _attention(
            q, k, v, scale, atten_mask if sparse_mode == 0 else _hidden(*query.shape[:1] * 2, before)
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape), *statistics
    lengths, key_lengths = (_lengths(ends) for ends in (actual_seq_qlen, actual_seq_kvlen))
    if min(lengths) < 1 or sum(lengths) != len(query) or query.shape[1] != head_num:
        raise ValueError(
            f"ends {actual_seq_qlen} are not those of {len(query)} tokens, {head_num} heads of {query.shape}"
        )
    if sum(key_lengths) != len(key) or any(k < q for k, q in zip(key_lengths, lengths, strict=True)):
        raise ValueError(f"ends {actual_seq_kvlen} are not those of {len(key)} keys for queries that end at {lengths}")
    cut = ((query, lengths), (key, key_lengths), (value, key_lengths))
    parts = zip(*(t.transpose(0, 1).split(sizes, 1) for t, sizes in cut), strict=True)
    found = zip(
        *(_attention(q, k, v, scale, _hidden(q.shape[1], k.shape[1], before)) for q, k, v in parts), strict=True
    )
    return tuple(torch.cat(part, 1).transpose(0, 1) for part in found)


def _lengths(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _hidden(queries: int, keys: int, before: int | None) -> torch.Tensor:
    """Returns a mask, True for keys after a query and for keys more than ``before`` positions before it."""
    everything = torch.ones(keys, keys, dtype=torch.bool)
    hidden = everything.triu(1) if before is None else everything.triu(1) | everything.tril(-min(before, keys) - 1)
    return hidden[keys - queries :]


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the result of attention over ``[..., heads, sequence, size]``, and the softmax's maximum and sum."""
    k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1).to(v.dtype) @ v
    largest = scores.detach().amax(-1, keepdim=True)
    total = (scores.detach() - largest).exp().sum(-1, keepdim=True)
    repeats = [1] * (largest.dim() - 1) + [8]
    return out, largest.repeat(repeats), total.repeat(repeats)
