# SPDX-License-Identifier: Apache-2.0
"""Tests of the planner of packed exports: its choices, the sizes that it reports, and what it refuses."""

import pytest
import torch

from bitcpm_megatron.checkpoint_tools.packed.planner import (
    LADDER,
    Plan,
    Weight,
    plan_compressed_tensors,
    plan_gguf,
    reach,
)
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError, TensorInfo
from bitcpm_megatron.checkpoint_tools.tensor_map import PROJECTION, megatron_tensors, part_shapes
from bitcpm_megatron.launch.launcher.presets import architecture

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def weights(preset: str, group_size: int = -1, shards: int = 1) -> list[Weight]:
    """Returns the weights of a preset in bf16, as a run with these flags would record them."""
    found = []
    for tensor in megatron_tensors(architecture(preset)):
        for name, shape in part_shapes([tensor]).items():
            group = None
            if PROJECTION.fullmatch(name):
                row = shape[1] // shards if tensor.kind == "row" else shape[1]
                group = row if group_size == -1 else group_size
            found.append(Weight(name, TensorInfo(shape, torch.bfloat16), group))
    return found


def linear(columns: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
    return Weight(O_PROJ, TensorInfo((64, columns), dtype), group)


def kinds(plan: Plan) -> dict[str, str]:
    return {choice.weight.module.rpartition(".")[2]: choice.kind for choice in plan.choices}


@pytest.mark.parametrize(
    ("preset", "embeddings", "ratio"),
    [
        ("minicpm4-8b", "F16", 5.18),
        ("minicpm4-8b", "Q8_0", 6.31),
        ("minicpm4-0.5b", "F16", 3.57),
        ("minicpm4-0.5b", "Q8_0", 5.03),
        ("bitcpm4-1b", "F16", 4.97),
        ("bitcpm4-1b", "Q8_0", 6.15),
        ("bitcpm-cann-1b", "F16", 3.44),
        ("bitcpm-cann-3b", "F16", 4.55),
        ("bitcpm-cann-3b", "Q8_0", 5.85),
    ],
)
def test_whole_file_ratios_of_the_presets(preset: str, embeddings: str, ratio: float) -> None:
    plan = plan_gguf(weights(preset), embedding_type=embeddings)
    assert plan.ratio == pytest.approx(ratio, abs=0.006)
    assert plan.linear_ratio == 16 / (66 * 8 / 256)


def test_bytes_of_the_8b_model_by_hand() -> None:
    """Hidden 4096, ffn 16384, 32 heads and 2 key/value heads of 128, 32 layers, two vocabularies of 73,448 rows."""
    linears = 32 * (2 * 4096 * 4096 + 2 * 256 * 4096 + 3 * 4096 * 16384)
    norms, vocabulary = 65 * 4096, 2 * 73448 * 4096
    plan = plan_gguf(weights("minicpm4-8b"))
    assert plan.nbytes == linears * 66 // 256 + norms * 4 + vocabulary * 2
    table = plan.table()
    assert f"{plan.nbytes:,} bytes, 5.18 times smaller than {2 * (linears + norms + vocabulary):,} in BF16" in table
    assert "the ternary linears alone 7.76 times" in table


def test_the_least_lossy_embeddings_that_reach_a_ratio() -> None:
    shapes = weights("minicpm4-8b")
    name, plan = reach(6.0, lambda kind: plan_gguf(shapes, embedding_type=kind), LADDER)
    assert (name, round(plan.ratio, 2)) == ("Q8_0", 6.31)
    assert reach(5.0, lambda kind: plan_gguf(shapes, embedding_type=kind), LADDER)[0] == "F16"
    with pytest.raises(ConversionError, match=r"--target-ratio 8 cannot be reached: .* 5\.18 \(F16\), 6\.31 \(Q8_0\)"):
        reach(8.0, lambda kind: plan_gguf(shapes, embedding_type=kind), LADDER)


@pytest.mark.parametrize(
    ("group", "shards", "column", "row"),
    [
        (-1, 1, "TQ2_0", "TQ2_0"),
        (-1, 8, "TQ2_0", "Q2_0"),  # in the 0.5B model, o_proj has 1024 / 8 = 128 elements per scale
        (256, 1, "TQ2_0", "TQ2_0"),
        (128, 1, "Q2_0", "Q2_0"),
        (64, 1, "Q2_0", "Q2_0"),
        (32, 1, "Q4_0", "Q4_0"),
    ],
)
def test_every_weight_gets_the_first_type_that_holds_it(group: int, shards: int, column: str, row: str) -> None:
    chosen = kinds(plan_gguf(weights("minicpm4-0.5b", group, shards)))
    assert {chosen[name] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")} == {column}
    assert chosen["o_proj"] == row and chosen["norm"] == "F32" and chosen["embed_tokens"] == "F16"
    # Rows of the ffn have 4096 elements, with 8 shards 512 per scale.
    assert chosen["down_proj"] == column


def test_groups_that_no_block_divides_stay_bf16() -> None:
    assert kinds(plan_gguf([linear(80, 80)]))["o_proj"] == "BF16"


@pytest.mark.parametrize(
    ("kind", "columns", "group", "nearest"),
    [
        ("TQ2_0", 1024, 128, "Q2_0"),
        ("TQ1_0", 1024, 128, "Q2_0"),
        ("TQ2_0", 1152, 1152, "Q2_0"),  # the row has 4.5 blocks
        ("Q2_0", 1024, 32, "Q4_0"),
        ("Q4_0", 80, 80, "BF16"),
    ],
)
def test_a_type_that_does_not_hold_a_weight_is_refused(kind: str, columns: int, group: int, nearest: str) -> None:
    with pytest.raises(ConversionError) as refused:
        plan_gguf([linear(columns, group)], kind)
    message = str(refused.value)
    assert "model.layers.0.self_attn.o_proj" in message and f"every {group} elements" in message
    assert f"--linear-type {nearest}" in message and "block of" in message


def test_embeddings_whose_rows_blocks_do_not_fill_are_refused() -> None:
    embedding = Weight("model.embed_tokens.weight", TensorInfo((10, 80), torch.bfloat16))
    with pytest.raises(ConversionError, match="model.embed_tokens has rows of 80, which blocks of 32"):
        plan_gguf([embedding, linear(64, 64)], embedding_type="Q8_0")


def test_full_precision_linears_keep_their_dtype() -> None:
    plain = Weight("model.layers.1.mlp.up_proj.weight", TensorInfo((64, 64), torch.float16))
    assert kinds(plan_gguf([linear(256, 256), plain]))["up_proj"] == "F16"
    assert kinds(plan_gguf([linear(256, 256), plain], "F32"))["up_proj"] == "F32"


@pytest.mark.parametrize(
    ("group", "per_group"), [(-1, None), (256, 66), (128, 34), (64, 18), (32, 10)], ids="row 256 128 64 32".split()
)
def test_bytes_of_compressed_tensors(group: int, per_group: int | None) -> None:
    plan = plan_compressed_tensors(weights("minicpm4-0.5b", group))
    for choice in plan.choices:
        rows, columns = choice.weight.info.shape[0], choice.weight.info.shape[-1]
        if choice.weight.group is None:
            assert choice.nbytes == choice.weight.info.nbytes
        else:
            row = columns // 4 + 2 if per_group is None else columns // group * per_group
            assert choice.nbytes == rows * row + 16  # the shape takes two int64, too
    assert plan_compressed_tensors(weights("minicpm4-0.5b", group), "4").linear_ratio < plan.linear_ratio


def test_words_that_a_group_does_not_fill() -> None:
    assert kinds(plan_compressed_tensors([linear(40, 40)]))["o_proj"] == "pack-quantized 4"
    for bits, columns, per_word in (("2", 40, 16), ("auto", 36, 16), ("4", 36, 8)):
        message = f"model.layers.0.self_attn.o_proj: groups of {columns} .* the {per_word} codes"
        with pytest.raises(ConversionError, match=message):
            plan_compressed_tensors([linear(columns, columns)], bits)
