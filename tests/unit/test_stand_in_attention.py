# SPDX-License-Identifier: Apache-2.0
"""Tests of the stand-in for torch_npu's fused attention, with which hosts train packed samples on a CPU."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = runpy.run_path(str(Path(__file__).parents[1] / "stubs" / "torch_npu" / "fusion_attention.py"))
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def attend(q, k, v, **changes) -> torch.Tensor:
    ends = {"actual_seq_qlen": [3, 8], "actual_seq_kvlen": [3, 8]}
    arguments = {"input_layout": "TND", "sparse_mode": 2, "atten_mask": MASK, "scale": 0.5, **ends, **changes}
    return ATTENTION["npu_fusion_attention"](q, k, v, q.shape[1], **arguments)[0]


def heads() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(8, number, 4, generator=draw) for number in (4, 2, 2)]


@pytest.mark.parametrize("mode", [{"sparse_mode": 2}, {"sparse_mode": 3}, {"sparse_mode": 4, "next_tockens": 0}])
def test_every_packed_sequence_attends_to_itself_alone(mode: dict) -> None:
    parts = zip(*(t.transpose(0, 1).split([3, 5], 1) for t in heads()), strict=True)
    alone = [scaled_dot_product_attention(*part, is_causal=True, scale=0.5, enable_gqa=True) for part in parts]
    torch.testing.assert_close(attend(*heads(), **mode), torch.cat(alone, 1).transpose(0, 1))


def test_a_band_ends_before_what_is_too_far_back() -> None:
    q, k, v = heads()
    near = attend(q, k, v, sparse_mode=4, pre_tockens=1, next_tockens=0)
    # Token 7 is the last of the second sequence, and attends to token 6 and itself.
    alone = scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q[7:], k[6:], v[6:])), scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(near[7:], alone.transpose(0, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"actual_seq_qlen": [0, 3, 8], "actual_seq_kvlen": [0, 3, 8]},
        {"actual_seq_qlen": [3, 7], "actual_seq_kvlen": [3, 7]},
        {"actual_seq_kvlen": [4, 8]},
        {"actual_seq_qlen": None, "actual_seq_kvlen": None},
        {"atten_mask": MASK[:8, :8]},
        {"atten_mask": None},
        {"sparse_mode": 0},
        {"sparse_mode": 4},
        {"sparse_mode": 4, "next_tockens": 1},
        {"input_layout": "BSH"},
    ],
)
def test_what_the_operator_would_not_take_raises(changes: dict) -> None:
    with pytest.raises((NotImplementedError, ValueError)):
        attend(*heads(), **changes)
