# SPDX-License-Identifier: Apache-2.0
"""Tests of packed linears: the weight of the training forward, and products to within the rounding of fp32 sums.

A product of n terms that is summed in fp32, in any order and with any scale applied after the sum of a group, has at
most n + 2 roundings in each term. It therefore differs from the exact one by at most
((1 + u)^(n + 2) - 1) sum |x| |w|, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). A result
in bf16 is rounded once more, by at most 2^-8.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from bitcpm_megatron import QuantizerConfig, fake_quantize, quantize
from bitcpm_megatron.inference import packed_linear
from bitcpm_megatron.inference.kernels import PackedKernels, cpu, kernels_for, npu, reference
from bitcpm_megatron.inference.packed_linear import PackedTernaryLinear
from bitcpm_megatron.ops import ascendc
from bitcpm_megatron.ops.cpu.library import build
from bitcpm_megatron.quantization import pack

DTYPES = (torch.bfloat16, torch.float32)
TOKENS = (1, 3, 4, 5, 32, 33, 100)
# Shapes have groups; row-parallel shards of whole rows, with groups of any multiple of 32; and rows of partial blocks.
SHAPES = [(7, 1280, group) for group in (-1, 256, 128, 64, 32)]
SHAPES += [(5, 1536, 1536 // shards) for shards in (2, 4, 8, 16)]
SHAPES += [(3, 480, 160), (9, 96, 32), (1, 32, 32)]
SHAPES += [(rows, columns, -1) for rows, columns in ((1, 1), (3, 33), (5, 1000), (9, 127), (2, 129), (6, 257))]

needs_compiler = pytest.mark.skipif(
    cpu.load()[1] is not None, reason=f"{cpu.load()[1]}; apt-get install gcc, then make test"
)


def made(rows: int, columns: int, group: int) -> tuple[PackedTernaryLinear, torch.Tensor]:
    """Returns a packed layer, and the fp32 weight that training would have multiplied by."""
    g = torch.Generator().manual_seed(rows * columns)
    latent = torch.randn(rows, columns, generator=g) * 10 ** torch.empty(rows, 1).uniform_(-3, 1, generator=g)
    latent[0, : columns // 2] = 0
    config = QuantizerConfig(group_size=group)
    codes, scales = quantize(latent, config)
    return PackedTernaryLinear(pack(codes), scales, columns), fake_quantize(latent, config)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def check_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Asserts that a product is within the bound of the module's docstring."""
    n, exact = weight.shape[1], x.double() @ weight.double().t()
    bound = ((1 + 2.0**-24) ** (n + 2) - 1) * (x.double().abs() @ weight.double().abs().t())
    if y.dtype == torch.bfloat16:
        bound += 2.0**-8 * (exact.abs() + bound)
    assert y.dtype == x.dtype and y.shape == exact.shape
    beyond = (y.double() - exact).abs() > bound
    assert not beyond.any(), (y[beyond][:5], exact[beyond][:5])


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulates a machine without a C compiler."""
    monkeypatch.setattr(cpu, "load", lambda: (None, "no C compiler (cc) on the PATH"))
    kernels_for.cache_clear()
    yield
    kernels_for.cache_clear()


# ---------------------------------------------------------------------------------------------------------- the weight


@needs_compiler
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_that_of_the_training_forward(rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    assert kernels_for("cpu").name == "cpu"
    layer, weight = made(rows, columns, group)
    found = layer.weight(dtype)
    assert found.dtype == dtype and torch.equal(found.float(), weight)
    assert not torch.signbit(found[found == 0]).any()


@needs_compiler
def test_scales_of_zero_and_below() -> None:
    """Training makes no such scales; with them, too, a zero has no sign."""
    codes = torch.tensor([[-1, 0, 1] * 32] * 3, dtype=torch.int8)
    layer = PackedTernaryLinear(pack(codes), torch.tensor([[0.0], [-0.0], [-2.0]], dtype=torch.bfloat16), 96)
    for dtype in DTYPES:
        found = layer.weight(dtype)
        assert torch.equal(found, reference.decode(layer.packed, layer.scales, 96, -1, dtype))
        assert not torch.signbit(found[found == 0]).any()


# ------------------------------------------------------------------------------------------------------------ products


@needs_compiler
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.verifies(
    "checkpoints",
    "products with packed weights are exact to within the rounding of fp32 sums, and unpacked weights equal those of"
    " the training forward pass",
    cuda="not run (Triton interpreted)",
    npu="not run (stand-in)",
)
def test_products_lie_within_the_rounding_of_sums_in_fp32(rows: int, columns: int, group: int) -> None:
    layer, weight = made(rows, columns, group)
    for dtype in DTYPES:
        for tokens in TOKENS:
            x = activations(tokens, columns, dtype)
            y = layer(x)
            if tokens > 32:  # this is the device's own product with the same weight
                assert torch.equal(y, linear(x, weight.to(dtype)))
            else:
                check_product(y, x, weight)


@needs_compiler
def test_threads_and_layout_change_no_bit() -> None:
    layer, _ = made(257, 1280, 128)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 9):
            x = activations(tokens, 1280, torch.bfloat16)
            expected = layer(x)
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                for same in (x, x.t().contiguous().t()):
                    assert torch.equal(layer(same), expected)
                assert torch.equal(layer(x.unsqueeze(0)), expected.unsqueeze(0))
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_many_tokens_take_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_DECODED_ELEMENTS", 3 * 1280)
    decoded: list[int] = []
    kernels = kernels_for("cpu")

    def decode(packed: torch.Tensor, *rest: object) -> torch.Tensor:
        decoded.append(len(packed))
        return kernels.decode(packed, *rest)

    monkeypatch.setattr(packed_linear, "kernels_for", lambda kind: PackedKernels("some", decode, kernels.multiply))
    layer, weight = made(7, 1280, 64)
    x = activations(50, 1280, torch.float32)
    check_product(layer(x), x, weight)
    assert decoded == [3, 3, 1]


@needs_compiler
def test_what_is_not_finite_passes_as_in_a_plain_product() -> None:
    layer, weight = made(7, 1280, 256)
    x = activations(6, 1280, torch.float32)
    x[1, 5], x[3, 7] = float("inf"), float("nan")
    for tokens in (x[:1], x[1:2], x[3:4], x):
        assert torch.equal(layer(tokens).isfinite(), linear(tokens, weight).isfinite())


def test_no_tokens_are_no_products() -> None:
    layer, _ = made(3, 33, -1)
    assert layer(torch.empty(2, 0, 33)).shape == (2, 0, 3)


# ------------------------------------------------------------------------------------------------------ other kernels


def test_without_a_compiler_torch_unpacks_and_says_so_once(fallback: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for rows, columns, group in ((7, 1280, 64), (5, 1000, -1)):
            layer, weight = made(rows, columns, group)
            for dtype in DTYPES:
                assert torch.equal(layer.weight(dtype).float(), weight)
                for tokens in (1, 33):
                    x = activations(tokens, columns, dtype)
                    assert torch.equal(layer(x), linear(x, weight.to(dtype)))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "unpacked by torch" in said and "no C compiler (cc) on the PATH" in said and "apt-get install gcc" in said


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("30 - 2 * k", "28 - 2 * k"),
        ("bytes[i] >> 2 * field", "bytes[i] >> field"),
        ("column / (columns / groups)", "column / BLOCK % groups"),
        ("scales[group_of[FIELDS]]", "scales[group_of[0]]"),
        ("left = group, scale++", "left = group"),
        ("memcpy(&words, from, BYTES)", "memcpy(&words, from, LANES)"),
        ("k % FIELDS * FIELD + word", "k / FIELDS * FIELD + word"),
        ("first + r < rows ? first + r", "first + 1 < rows ? first + 1"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, header = cpu._SOURCES
    text = source.read_text().replace("../../ops/cpu/bits.h", str(header))
    assert text.count(right) == 1
    (tmp_path / "wrong.c").write_text(text.replace(right, wrong))
    monkeypatch.setenv("BITCPM_CACHE_DIR", str(tmp_path / "cache"))
    library = build("wrong", [tmp_path / "wrong.c"], cpu._SIGNATURES, (*cpu._FLAGS, "-O1"))
    monkeypatch.setattr(cpu, "load", lambda: library)
    assert cpu.kernels().name == "torch"
    assert "the compiled kernel is wrong" in caplog.text


def test_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run interpreted, or on a GPU with TRITON_INTERPRET=0."""
    launch = pytest.importorskip("bitcpm_megatron.ops.triton.launch", reason="triton is not installed")
    from bitcpm_megatron.inference.kernels import cuda

    monkeypatch.setattr(packed_linear, "kernels_for", lambda kind: cuda.triton_kernels())
    device = "cpu" if launch.INTERPRETED else "cuda"
    for rows, columns, group in ((130, 384, 32), (5, 384, 96), (3, 160, -1), (2, 33, -1), (2, 512, 256)):
        layer, weight = made(rows, columns, group)
        layer = layer.to(device)
        for dtype in DTYPES:
            assert torch.equal(layer.weight(dtype).float().cpu(), weight)
            for tokens in (1, 2):
                x = activations(tokens, columns, dtype)
                check_product(layer(x.to(device)).cpu(), x, weight)
    with pytest.raises(ValueError, match="33 tokens"):
        cuda.multiply(torch.zeros(33, 512), layer.packed, layer.scales)


def test_an_npu_without_its_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ascendc, "unavailable", lambda kind: f"libbitcpm_ascendc.so for {kind} is not built: make kernel"
    )
    with pytest.raises(RuntimeError, match="cannot be computed with on an NPU: .* for npu is not built: make kernel"):
        npu.kernels()
    monkeypatch.setattr(ascendc, "unavailable", lambda kind: None)
    assert npu.kernels().name == "ascendc" and npu.kernels().multiply is None


# ------------------------------------------------------------------------------------------------------------ the rest


def test_casts_and_copies_keep_the_scales(tmp_path: Path) -> None:
    layer, weight = made(7, 1280, 64)
    for cast in (layer.float(), layer.half(), layer.to(torch.float64), layer.bfloat16()):
        assert cast.scales.dtype == torch.bfloat16 and torch.equal(cast.weight(torch.float32), weight)
    state = layer.state_dict()
    assert {name: t.nbytes for name, t in state.items()} == {"packed": 7 * 320, "scales": 7 * 20 * 2}
    other, _ = made(7, 1280, 64)
    other.scales.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.weight(torch.float32), weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer: layer(torch.zeros(1, 64, dtype=torch.half)), TypeError, "float16: packed weights are"),
        (lambda layer: layer.weight(torch.half), TypeError, "float16: packed weights are unpacked to"),
        (lambda layer: layer(torch.zeros(1, 63)), ValueError, r"shape \(1, 63\) for rows of 64"),
        (lambda layer: layer(torch.zeros(1, 64, device="meta")), RuntimeError, "activations on meta"),
        (
            lambda layer: layer(torch.zeros(1, 64, requires_grad=True)),
            RuntimeError,
            "no backward: call the model under",
        ),
        (lambda layer: layer.to("meta")(torch.zeros(1, 64, device="meta")), RuntimeError, "on cpu, cuda, npu, not on"),
        (lambda layer: PackedTernaryLinear(layer.packed, layer.scales, 129), ValueError, r"pass uint8 \[out, 64\]"),
        (lambda layer: PackedTernaryLinear(layer.packed, layer.scales.float(), 64), ValueError, "and bfloat16"),
        (
            lambda layer: PackedTernaryLinear(layer.packed, layer.scales.repeat(1, 4), 64),
            ValueError,
            "8 scales for a row",
        ),
        (lambda layer: PackedTernaryLinear(layer.packed, layer.scales[:2], 64), ValueError, "with scales of shape"),
    ],
)
def test_what_it_refuses(call: Callable[[PackedTernaryLinear], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(made(3, 64, 32)[0])


@pytest.mark.slow
def test_it_needs_neither_megatron_core_nor_transformers() -> None:
    code = (
        "import sys, bitcpm_megatron.inference.packed_linear, bitcpm_megatron.inference.packed_model\n"
        "print([name for name in ('megatron', 'transformers', 'accelerate', 'triton') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"
