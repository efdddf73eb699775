# SPDX-License-Identifier: Apache-2.0
"""Tests of packed sequences: documents in one row give the same attention, positions, losses and gradients as alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from test_core_attention import Largest

from bitcpm_megatron.attention.documents import (
    CUMULATIVE,
    STARTS,
    by_rank,
    in_order,
    of_rank,
    pack,
    packed_seq_params,
    starts_after,
)
from bitcpm_megatron.objectives.language_modeling import language_modeling
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.model import build_model

MODEL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --mock-data --vocab-size 128
    --train-iters 1 --lr 1 --eval-iters 0 --init-method-std 0.1 --ternary --reset-position-ids --reset-attention-mask
""".split()
ROPE = ["--position-embedding-type", "rope"]
# A head has 16 channels and 8 frequencies; the long factors apply from position 20 on.
LONGROPE = [
    *ROPE,
    *"--rope-scaling-type longrope --rope-scaling-original-max-position-embeddings 20".split(),
    *"--rope-scaling-short-factor 1 1 1 1 1 1 1 1".split(),
    *"--rope-scaling-long-factor 1 1.5 2 3 4 6 8 16".split(),
]
LEARNED = ["--position-embedding-type", "learned_absolute"]
# The lengths of the documents in two rows of 64 tokens each.
LENGTHS = [[16, 1, 30, 17], [1, 1, 62]]


def model_of(*flags: str):
    """Makes a model that has its gradients in ``.grad``, and the same weights every time."""
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    return build_model(parse_args([*MODEL, *flags], 1), 128, with_ddp=False).chunks[0]


def rows(lengths: list[list[int]]) -> dict[str, torch.Tensor]:
    """Returns a micro-batch of documents with these lengths, in which some tokens are not counted in the loss."""
    generator = torch.Generator().manual_seed(5)
    size = (len(lengths), sum(lengths[0]))
    starts = torch.tensor([[token == 0 for n in row for token in range(n)] for row in lengths])
    positions = torch.tensor([[token for n in row for token in range(n)] for row in lengths])
    return {
        "tokens": torch.randint(128, size, generator=generator),
        "labels": torch.randint(128, size, generator=generator),
        "loss_mask": (torch.rand(size, generator=generator) < 0.8).float(),
        "position_ids": positions,
        STARTS: starts,
    }


def alone(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Returns the documents of a micro-batch, each as a batch of one ordinary row."""
    ends = batch[STARTS].flatten().nonzero().flatten().tolist()[1:] + [batch[STARTS].numel()]
    starts = [0, *ends[:-1]]
    flat = {name: value.flatten() for name, value in batch.items() if name != STARTS}
    return [{name: value[a:b].unsqueeze(0) for name, value in flat.items()} for a, b in zip(starts, ends, strict=True)]


def loss_and_gradients(model, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the mean loss over the counted tokens of all batches, and its gradients."""
    model.zero_grad()
    parts = []
    for batch in batches:
        output, loss_of = language_modeling(batch, model)
        parts.append(loss_of(output)[:2])
    loss = sum(total for total, _ in parts) / sum(int(count) for _, count in parts)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Returns the largest norm of a difference of gradients, relative to the norm of the gradient."""
    assert sorted(one) == sorted(other)
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


@pytest.mark.parametrize("positions", [ROPE, LONGROPE, LEARNED, [*ROPE, "--window-size", "7,0"]])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.verifies(
    "training",
    "documents packed into one row give the same loss and gradients as separate documents (1e-6, fp32): with RoPE, "
    "LongRoPE, learned positions and sliding windows",
    cuda="kernels not run",
    npu="kernels not run",
)
def test_packed_documents_are_what_they_are_one_by_one(positions, micro_batch: int, single_rank: None) -> None:
    model, batch = model_of(*positions), rows(LENGTHS[:micro_batch])
    packed = loss_and_gradients(model, [pack(batch)])
    separate = loss_and_gradients(model, alone(batch))
    assert float(packed[0]) == pytest.approx(float(separate[0]), rel=1e-6)
    assert largest_difference(packed[1], separate[1]) < 1e-6
    # Without the boundaries, the loss and the gradients differ.
    del batch[STARTS]
    joined = loss_and_gradients(model, [pack(batch)])
    assert abs(float(joined[0] - separate[0])) > 1e-3
    assert largest_difference(joined[1], separate[1]) > 1e-2


@pytest.mark.parametrize("flags", [ROPE, [*ROPE, "--window-size", "7,0"]])
def test_a_token_changes_no_bit_of_another_documents_logits(flags: list[str], single_rank: None) -> None:
    model, batch = model_of(*flags), rows(LENGTHS)
    model.eval()

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            output, _ = language_modeling({**pack(batch), "labels": None}, model)
        return output[0]

    before = logits(batch)
    for changed in (17, 46, 64, 65, 127):
        other = copy.deepcopy(batch)
        other["tokens"].view(-1)[changed] = (other["tokens"].view(-1)[changed] + 1) % 128
        bounds = [*batch[STARTS].flatten().nonzero().flatten().tolist(), 128]
        (first, end) = next((a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a <= changed < b)
        moved = (logits(other) != before).any(-1).nonzero().flatten().tolist()
        assert moved and min(moved) == changed and max(moved) < end and first <= changed


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize("flags", [ROPE, LONGROPE])
def test_every_document_starts_at_position_0(flags, ranks: int, rank: int, single_rank: None, monkeypatch) -> None:
    """The rotary angles of queries show it, whatever ``max_seqlen`` is; a loss would not, because RoPE is relative."""
    from megatron.core.models.common.embeddings import rope_utils

    rope = model_of(*flags).rotary_pos_emb
    parameters = packed_seq_params(pack(rows([[16, 1, 30, 17]]))[CUMULATIVE])
    parameters.max_seqlen_q = parameters.max_seqlen_kv = 64
    table = rope(rope.get_rotary_seq_len(None, None, None, None, parameters), packed_seq=True)

    class Group:
        def size(self) -> int:
            return ranks

        def rank(self) -> int:
            return rank

    seen = []
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", lambda t, freqs, **_: seen.append(freqs) or t)
    part = torch.zeros(64 // ranks, 4, 16)
    rope_utils._apply_rotary_pos_emb_thd(part, parameters.cu_seqlens_q_padded, table, cp_group=Group())
    (found,) = seen
    exponents = torch.arange(0, 16, 2) / 16
    long = torch.tensor([1, 1.5, 2, 3, 4, 6, 8, 16]) if flags is LONGROPE else torch.ones(8)
    expected = []
    for length in (16, 1, 30, 17):
        factor = long if length > 20 else torch.ones(8)
        expected.append(torch.arange(length)[:, None] / (10000**exponents * factor))
    whole = torch.cat(expected).repeat(1, 2)[:, None, None]
    assert torch.allclose(found, of_rank(whole, 0, rank, ranks), rtol=1e-6, atol=0)


def test_nothing_in_a_step_of_the_model_is_a_square(single_rank: None) -> None:
    """The whole model needs no T x T memory either; tests/unit/test_core_attention.py tests 32,768 tokens."""
    tokens = 2048
    model = model_of(*ROPE, "--seq-length", str(tokens), "--max-position-embeddings", str(tokens))
    with Largest() as largest:
        loss_and_gradients(model, [pack(rows([[1500, 1, tokens - 1501]]))])
    # The largest tensor holds the gate and up projections.
    assert largest.elements == tokens * 2 * 96


def test_documents_start_behind_the_tokens_that_end_them() -> None:
    tokens = torch.tensor([[7, 3, 9, 7, 7], [3, 3, 3, 3, 7]])
    assert starts_after(tokens, 7).tolist() == [[False, True, False, False, True], [False] * 5]
    packed = pack({"tokens": tokens, STARTS: starts_after(tokens, 7)})
    assert packed[CUMULATIVE].tolist() == [0, 1, 4, 5, 10] and packed[CUMULATIVE].dtype == torch.int32
    assert packed["tokens"].shape == (1, 10)


@given(st.integers(1, 8), st.integers(1, 5))
def test_ranks_hold_a_chunk_from_either_end(ranks: int, length: int) -> None:
    whole = torch.arange(2 * ranks * length)
    parts = [of_rank(whole, 0, rank, ranks) for rank in range(ranks)]
    assert torch.equal(in_order(torch.cat(parts), ranks), whole)
    assert torch.equal(by_rank(whole, ranks), torch.cat(parts))
    if ranks > 1:
        assert parts[0][0] == 0 and parts[0][-1] == len(whole) - 1
