# SPDX-License-Identifier: Apache-2.0
"""Tests of core attention: equal to megatron-core's, with windows and documents, by every kernel, without T x T memory.

T is the number of tokens.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.utils._python_dispatch import TorchDispatchMode

from bitcpm_megatron.attention import kernels
from bitcpm_megatron.attention.core import CoreAttention
from bitcpm_megatron.attention.documents import packed_seq_params
from bitcpm_megatron.attention.kernels import Weighting

HEADS, GROUPS, SIZE = 4, 2, 16


def config(**changes) -> TransformerConfig:
    values = {"attention_dropout": 0.0, "masked_softmax_fusion": False, **changes}
    return TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=GROUPS, **values
    )


def build(kind=CoreAttention, softmax_scale: float | None = None, **changes):
    arguments = {"softmax_scale": softmax_scale, "cp_comm_type": "a2a", "pg_collection": None}
    return kind(config(**changes), 1, AttnMaskType.causal, "self", **arguments)


def qkv(*shape: int, dtype: torch.dtype = torch.float32, heads=(HEADS, GROUPS, GROUPS)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(*shape, n, SIZE, generator=generator).to(dtype) for n in heads)
    return [x.requires_grad_() for x in made]


def with_gradients(attention, inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    out = attention(*inputs, None, **options)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("window", [None, (5, 0), (31, 0), (100, 0)])
def test_it_is_megatron_cores_attention(scale: float | None, window: tuple | None, single_rank: None) -> None:
    """The windows are small enough for the mask that upstream's softmax makes."""
    ours, theirs = (build(kind, scale, window_size=window) for kind in (CoreAttention, DotProductAttention))
    for mine, upstream in zip(*(with_gradients(a, qkv(32, 2)) for a in (ours, theirs)), strict=True):
        # The bound covers two sums of some 32 terms and a softmax; no value is larger than a few units.
        assert torch.allclose(mine, upstream, rtol=0, atol=32 * 2**-23 * float(upstream.abs().max()))


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_beyond_the_window_has_no_gradient(
    block: int, window: int, packed: bool, single_rank: None, monkeypatch
) -> None:
    monkeypatch.setattr(kernels, "_MASKED_BLOCK", block)
    attention = build(window_size=(window, 0))
    lengths = torch.tensor([0, 20, 21, 40] if packed else [0, 40], dtype=torch.int32)
    options = {"packed_seq_params": packed_seq_params(lengths)} if packed else {}
    for token in (0, window, 19, 20, 21, 39):
        start = int(lengths[lengths <= token].max())
        seen = torch.arange(max(start, token - window), token + 1)
        inputs = qkv(40) if packed else qkv(40, 1)
        out = attention(*inputs, None, **options)
        for gradient in torch.autograd.grad(out[token].square().sum(), inputs[1:]):
            touched = gradient.flatten(1).abs().sum(1).nonzero().flatten()
            # A token that attends only to itself has the weight 1, whatever its key is.
            assert torch.equal(touched, seen) or (len(seen) == 1 and len(touched) == 0)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_last_tokens_alone_attend_as_among_all(window: int | None, block: int, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_MASKED_BLOCK", block)
    stub = runpy.run_path(str(Path(__file__).parents[1] / "stubs" / "torch_npu" / "fusion_attention.py"))
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(**stub))
    query, key, value = (x.detach() for x in qkv(20, 2))
    weighting = Weighting(0.3, window)
    whole = kernels.attend_rows(query, key, value, weighting)
    for last in (1, 2, 7, 20):
        for attend in (kernels.attend_rows, kernels._rows_on_npu):
            found = attend(query[-last:], key, value, weighting)
            assert torch.allclose(found, whole[-last:], rtol=0, atol=20 * 2**-23)


def test_dropout_draws_from_the_tensor_parallel_ranks_own_generator(single_rank: None) -> None:
    model_parallel_cuda_manual_seed(5)
    attention, inputs = build(attention_dropout=0.5), qkv(16, 2)
    state = torch.get_rng_state()
    one, other = (attention(*inputs, None) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state()), "the default generator is that of all ranks alike"
    model_parallel_cuda_manual_seed(5)
    assert torch.equal(attention(*inputs, None), one)
    attention.eval()
    assert torch.equal(attention(*inputs, None), attention(*inputs, None))


def test_what_it_does_not_do_is_refused(single_rank: None) -> None:
    for changes, named in (
        ({"window_size": (3, 2)}, "a window to the right"),
        ({"softmax_type": "off-by-one"}, "softmax_type off-by-one"),
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling"),
    ):
        with pytest.raises(ValueError, match=named):
            build(**changes)
    with pytest.raises(ValueError, match="takes no mask"):
        build()(*qkv(4, 1), torch.ones(1))


LENGTHS = torch.tensor([0, 3, 4, 10, 24], dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_kernels_get_what_they_want(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``varlen_attn`` of torch needs CUDA; a stand-in with its signature computes what is documented, with masks."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10: this torch has no varlen_attn")
    if not kernels._has_varlen():
        pytest.skip("this torch's varlen_attn has no grouped heads or no window; needs torch 2.12")
    import inspect

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        q, k, v, ends, left = call["query"], call["key"], call["value"], call["cu_seq_q"], call["window_size"][0]
        assert call["enable_gqa"] and ends.dtype == torch.int32 and torch.equal(ends, call["cu_seq_k"])
        assert call["max_q"] == call["max_k"] == 14 and call["window_size"][1] == 0
        assert all(x.is_contiguous() for x in (q, k, v))
        document = torch.bucketize(torch.arange(len(q)), ends.long(), right=True)
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (document[:, None] == document) & (back >= 0) & ((back <= left) if left >= 0 else True)
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * call["scale"]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    inputs = qkv(24)
    found = kernels._varlen(*inputs, LENGTHS, Weighting(0.3, window))
    expected = kernels.attend_documents(*inputs, Weighting(0.3, window), LENGTHS)
    assert torch.allclose(found, expected, rtol=0, atol=24 * 2**-23)


def test_varlen_kernels_are_chosen_for_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_varlen", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def taken(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, d: int = 128, dropout: float = 0.0) -> bool:
        query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(24, HEADS, d))
        return kernels._flash_takes(query, Weighting(0.3, dropout=dropout))

    capability = (8, 0)
    assert taken() and taken(dtype=torch.float16) and taken(d=256) and taken(d=40)
    assert not any((taken("cpu"), taken(dtype=torch.float32), taken(d=36), taken(d=264), taken(dropout=0.1)))
    capability = (7, 5)
    assert not taken()


@pytest.mark.parametrize("window", [None, 4])
def test_the_fused_attention_of_an_npu_gets_what_it_wants(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = runpy.run_path(str(Path(__file__).parents[1] / "stubs" / "torch_npu" / "fusion_attention.py"))
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return stub["npu_fusion_attention"](*args, **kwargs)

    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu_fusion_attention=recorded))
    inputs = qkv(24)
    found = kernels._on_npu(*inputs, LENGTHS, Weighting(0.3, window))
    expected = kernels.attend_documents(*inputs, Weighting(0.3, window), LENGTHS)
    assert torch.allclose(found, expected, rtol=0, atol=24 * 2**-23)
    (call,) = calls
    assert call["actual_seq_qlen"] == call["actual_seq_kvlen"] == [3, 4, 10, 24], "the operator wants no 0 in front"


class Largest(TorchDispatchMode):
    """A mode that records the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, (1024, 0)])
def test_32k_tokens_make_no_square(window: tuple | None, single_rank: None) -> None:
    """Forward and backward run on two documents, and on one row, of 32,768 tokens."""
    tokens = 32768
    attention = build(window_size=window)
    for shape, packed in (((tokens,), torch.tensor([0, 20000, tokens], dtype=torch.int32)), ((tokens, 1), None)):
        options = {} if packed is None else {"packed_seq_params": packed_seq_params(packed)}
        with Largest() as largest:
            inputs = qkv(*shape, dtype=torch.bfloat16)
            with_gradients(attention, inputs, **options)
        # No tensor is larger than the queries.
        assert largest.elements <= tokens * HEADS * SIZE
    with Largest() as largest:
        with_gradients(build(DotProductAttention), qkv(2048, 1))
    assert largest.elements == HEADS * 2048**2, "the count would see a square"
