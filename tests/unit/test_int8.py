# SPDX-License-Identifier: Apache-2.0
"""Tests of int8 GEMMs: the integers and the results, bit for bit, and ternary layers that compute with them."""

import functools
import gc
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from support.integers import DEFAULT, activations, by_definition, check_products, check_quantize, ternary_weight

from bitcpm_megatron import apply_recipe, dequantize, quantize
from bitcpm_megatron.checkpoint_tools.hf_model.modeling_bitcpm import TernaryLinear
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.nn import linear
from bitcpm_megatron.nn.cache import find_epoch
from bitcpm_megatron.nn.int8 import Int8Product
from bitcpm_megatron.ops import fake_quantize_activations
from bitcpm_megatron.ops.int8 import (
    Int8Kernels,
    codes_of,
    cpu,
    cuda,
    int8_input_gradient,
    int8_linear,
    npu,
    quantize_tokens,
    reference,
)
from bitcpm_megatron.parallel import ProbeError, Recipe, RecipeError, StaleCacheError, is_shadow, probe, ternary_state
from bitcpm_megatron.quantization import LONGEST_SUM, integer_activations, quantize_activations

HALF = (torch.bfloat16, torch.float16)
single_rank = pytest.mark.usefixtures("single_rank")


def kernels_here() -> list[Int8Kernels]:
    return list({id(k): k for k in (reference.kernels, cpu.kernels())}.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HALF), st.integers(1, 5), st.integers(1, 300), st.floats(-6, 3), st.integers(0, 2**31))
def test_quantized_activations_hold_their_codes(dtype, tokens, features, exponent, seed) -> None:
    x = (torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * 10**exponent).to(dtype)
    codes, scales = integer_activations(x, 1e-5)
    again, same = integer_activations(quantize_activations(x, 1, 1e-5), 1e-5)
    assert torch.equal(codes, again) and torch.equal(scales, same)
    assert torch.equal(codes, (x.float() / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) * 127).round().char())


@pytest.mark.parametrize("kernels", kernels_here(), ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (6, 64), (3, 1000), (5, 4097)])
def test_every_backend_quantizes_as_the_reference(kernels: Int8Kernels, dtype: torch.dtype, shape: tuple) -> None:
    check_quantize(kernels, activations(*shape, dtype))


@pytest.mark.parametrize("kernels", kernels_here(), ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", HALF)
def test_products_and_codes_are_the_references(kernels: Int8Kernels, dtype: torch.dtype) -> None:
    check_products(kernels, dtype)


@pytest.mark.parametrize("kernels", kernels_here(), ids=lambda k: k.name)
def test_what_is_not_finite_stays_so_in_its_own_token(kernels: Int8Kernels) -> None:
    x = torch.randn(4, 64).bfloat16()
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    weight = ternary_weight(8, 64, torch.bfloat16)
    tokens = kernels.quantize(x, 1e-5, None, True)
    y = kernels.product(tokens, kernels.codes(weight)[0].t(), kernels.codes(weight)[1])
    for result in (tokens.values, y):
        assert result[1:3].isnan().all() and result[[0, 3]].isfinite().all()
    broken = weight.clone()
    broken[3, 1] = float("nan")
    codes, scales = kernels.codes(broken)
    y = kernels.product(kernels.quantize(x[:1], 1e-5, None, False), codes.t(), scales)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all()


@pytest.mark.parametrize("at_once", [1, 3])
def test_sums_that_are_made_and_scaled_in_parts_are_the_same(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SUMS_AT_ONCE", 0)
    monkeypatch.setattr(cpu, "_FEWEST_ROWS", at_once)
    check_products(cpu.kernels(), torch.bfloat16)


def test_an_npu_is_asked_by_the_documentation_of_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = runpy.run_path(str(Path(__file__).parents[1] / "stubs" / "torch_npu" / "quant_matmul.py"))
    calls = []

    def recorded(*arguments, **named) -> torch.Tensor:
        calls.append(named)
        return stub["npu_quant_matmul"](*arguments, **named)

    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu_quant_matmul=recorded))
    kernels = npu.kernels()
    for dtype in HALF:
        check_quantize(kernels, activations(6, 64, dtype))
        check_products(kernels, dtype)
    assert calls and kernels.refuses("npu", 64, 65535) is None
    assert "65535, not 64 x 65536" in kernels.refuses("npu", 64, 65536)
    empty = kernels.quantize(torch.zeros(0, 2, 64, dtype=torch.bfloat16), 1e-5, None, False)
    assert kernels.product(empty, torch.zeros(64, 8, dtype=torch.int8), None).shape == (0, 2, 8)
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace())
    assert "has no npu_quant_matmul" in kernels.refuses("npu", 64, 64)


def preset_shapes() -> list[tuple[int, int]]:
    """Returns the shapes of the linears of all presets, as (output features, input features)."""
    found = set()
    for name in presets.names():
        flags = presets.read(name).flags
        hidden, ffn, heads = flags["hidden-size"], flags["ffn-hidden-size"], flags["num-attention-heads"]
        wide = flags.get("kv-channels", hidden // heads)
        groups = flags.get("num-query-groups", heads)
        found |= {((heads + 2 * groups) * wide, hidden), (hidden, heads * wide), (2 * ffn, hidden), (hidden, ffn)}
    return sorted(found)


@pytest.mark.parametrize(("rows", "columns"), preset_shapes())
@pytest.mark.verifies(
    "quantizer",
    "an int8 GEMM equals the fp32 GEMM of the same integers bit for bit, for rows as long as those of every model "
    "preset",
)
def test_int8_is_the_fp32_gemm_of_the_same_integers_for_all_preset_shapes(rows: int, columns: int) -> None:
    # Only some rows are tested: the length of a sum depends on the length of a row, not on the number of rows.
    weight = ternary_weight(min(rows, 520), columns, torch.bfloat16)
    codes, scales = codes_of(weight)
    assert columns <= LONGEST_SUM
    for tokens in (1, 5):
        x = quantize_activations(activations(tokens, columns, torch.bfloat16), 1, 1e-5)
        assert torch.equal(int8_linear(x, codes, scales), by_definition(x, weight))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 400), st.floats(-3, 3), st.integers(0, 2**31))
def test_the_difference_to_a_bf16_gemm_is_rounding(tokens, features, exponent, seed) -> None:
    """The bound is derived in docs/quantizer.md."""
    x = (torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * 10**exponent).bfloat16()
    weight = ternary_weight(24, features, torch.bfloat16, seed)
    values = fake_quantize_activations(x)
    found, plain = int8_linear(values, *codes_of(weight)), values @ weight.t()
    absolute = values.double().abs() @ weight.double().abs().t()
    unit, single = 2.0**-8, 2.0**-24
    bound = absolute * (unit + features * single) + unit * (found.double().abs() + plain.double().abs())
    assert bool(((found.double() - plain.double()).abs() <= bound * (1 + unit) + 1e-38).all())


def test_an_exported_model_computes_the_same() -> None:
    """The layer of exports multiplies unrounded activations by the weight in fp32, a difference of one rounding."""
    linear = torch.nn.Linear(96, 40, bias=False)
    x = activations(6, 96, torch.bfloat16, spread=1.0)
    weight = dequantize(*quantize(linear.weight.detach().bfloat16(), DEFAULT), DEFAULT, torch.bfloat16)
    TernaryLinear.convert(linear, 96, DEFAULT.eps, torch.bfloat16, 1)
    found, exported = int8_linear(quantize_tokens(x), *codes_of(weight)).double(), linear(x.float()).detach().double()
    absolute = fake_quantize_activations(x).double().abs() @ weight.double().abs().t()
    assert bool(((found - exported).abs() <= 2.0**-8 * exported.abs() + 100 * 2.0**-24 * absolute).all())


class Linears(torch.nn.Module):
    def __init__(self, **changes) -> None:
        super().__init__()
        values = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "params_dtype": torch.bfloat16}
        config = TransformerConfig(**{**values, **changes})
        init = torch.nn.init.xavier_normal_
        self.fc1 = ColumnParallelLinear(64, 128, config=config, init_method=init, bias=True)
        self.fc2 = RowParallelLinear(
            128, 64, config=config, init_method=init, bias=True, input_is_parallel=True, skip_bias_add=False
        )
        self.dense = torch.nn.Linear(64, 32, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.fc2(self.fc1(x)[0])[0])


def everything(**config) -> Recipe:
    matchers = {"all": {"config": "q", "pattern": "*"}}
    return Recipe.from_mapping({"configs": {"q": config}, "matchers": matchers}, DEFAULT)


def ternary(model: torch.nn.Module, gemm: str, **options) -> torch.nn.Module:
    apply_recipe(model, everything(), default=DEFAULT, activation_bits=8, gemm=gemm, **options)
    return model


@single_rank
def test_a_layer_computes_the_integer_product_and_the_gradients_of_the_bf16_one() -> None:
    int8, bf16 = Linears(), Linears()
    bf16.load_state_dict(int8.state_dict())
    ternary(int8, "int8"), ternary(bf16, "bf16")
    for name in ("fc1", "fc2", "dense"):
        ours, theirs = getattr(int8, name), getattr(bf16, name)
        x = torch.randn(5, 2, ours.weight.shape[1]).bfloat16().requires_grad_()
        y = ours(x)[0] if name != "dense" else ours(x)
        weight = dequantize(*quantize(ours.weight, DEFAULT), DEFAULT, torch.bfloat16)
        assert torch.equal(y, by_definition(fake_quantize_activations(x.detach()), weight) + ours.bias)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        mine = (x.grad.clone(), ours.weight.grad)
        x.grad = None
        other = theirs(x)[0] if name != "dense" else theirs(x)
        other.backward(gradient)
        # The default input gradient is that of the bf16 GEMM, and the weight's that of the straight-through estimator.
        assert torch.equal(mine[0], x.grad) and torch.equal(mine[1], theirs.weight.grad)
        definition = gradient.double().flatten(0, 1).t() @ fake_quantize_activations(x.detach()).double().flatten(0, 1)
        assert torch.allclose(mine[1].double(), definition, rtol=2.0**-8, atol=1e-5 * definition.abs().max().item())


@single_rank
@pytest.mark.parametrize(
    "transposed", [torch.t, lambda w: w.T, lambda w: w.transpose(0, 1), lambda w: w.transpose(-1, 0)]
)
def test_a_linear_that_leaves_the_gradients_to_autograd(transposed, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ternary(Linears(), "int8"), torch.randn(5, 2, 64).bfloat16().requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        x.grad = None
        model.zero_grad()
        y = model.dense(x)
        y.square().sum().backward()
        return y.detach(), x.grad, model.dense.weight.grad

    expected = gradients()
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x @ transposed(self.weight) + self.bias)
    assert all(map(torch.equal, gradients(), expected))


@single_rank
def test_an_int8_input_gradient_is_the_integer_product() -> None:
    model = ternary(Linears(), "int8", gemm_backward="int8")
    x = torch.randn(5, 2, 64).bfloat16().requires_grad_()
    y, _ = model.fc1(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    weight = dequantize(*quantize(model.fc1.weight, DEFAULT), DEFAULT, torch.bfloat16)
    assert torch.equal(x.grad, int8_input_gradient(gradient, *codes_of(weight)))
    plain = gradient.float() @ weight.float()
    assert 0 < (x.grad.float() - plain).abs().max() < 0.05 * plain.abs().max()


@single_rank
def test_codes_are_made_once_per_epoch_and_not_kept_where_no_weight_is() -> None:
    for cache, kept in (("step", True), ("none", False)):
        model = ternary(Linears(), "int8", cache=cache)
        epoch, state = find_epoch(model), ternary_state(model.fc1)
        epoch.start(), epoch.begin()
        x = torch.randn(3, 1, 64).bfloat16()
        first = model(x)
        codes = state.codes
        assert (codes is not None) == kept
        assert torch.equal(model(x), first) and (not kept or state.codes is codes)
        with torch.no_grad():
            model.fc1.weight.neg_()
        epoch.begin()
        assert not torch.equal(model(x), first)
        epoch.end()
        assert torch.equal(model(x), model(x)) and state.codes is None


@single_rank
def test_verify_mode_finds_codes_that_are_not_the_weights() -> None:
    model = ternary(Linears(), "int8", verify_cache=True)
    find_epoch(model).start(), find_epoch(model).begin()
    x = torch.randn(3, 1, 64).bfloat16()
    model(x)
    ternary_state(model.fc2).codes[0].zero_()
    with pytest.raises(StaleCacheError, match="fc2: its int8 codes"):
        model(x)


@single_rank
@pytest.mark.parametrize("gemm_backward", ["bf16", "int8"])
def test_recompute_and_frozen_weights_change_no_gradient(gemm_backward: str) -> None:
    model = ternary(Linears(), "int8", gemm_backward=gemm_backward)
    x = torch.randn(3, 1, 64).bfloat16().requires_grad_()

    def gradients(compute) -> list[torch.Tensor]:
        x.grad = None
        model.zero_grad()
        compute(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = gradients(model)
    counted = [ternary_state(layer).gradients for layer in (model.fc1, model.fc2, model.dense)]
    assert len(expected) == 7 and all(c.computed == c.passed == (gemm_backward == "int8") for c in counted)
    for reentrant in (True, False):
        checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=reentrant)
        if reentrant or gemm_backward == "bf16":
            assert all(map(torch.equal, gradients(checkpointed), expected))
        else:
            # torch passes a plain tensor with the values of the saved weight to upstream's backward.
            with pytest.raises(RuntimeError, match="non-reentrant recompute.*use --ternary-gemm-backward bf16"):
                gradients(checkpointed)
    model.requires_grad_(False)
    assert torch.equal(gradients(model)[0], expected[0])


@single_rank
def test_an_int8_gradient_that_was_computed_otherwise_is_an_error() -> None:
    x = torch.randn(3, 1, 64).bfloat16().requires_grad_()
    for gemm_backward, refused in (("bf16", False), ("int8", True)):
        model = ternary(Linears(), "int8", gemm_backward=gemm_backward)
        with torch.autograd.graph.save_on_cpu():
            y = model(x).sum()
        if refused:
            with pytest.raises(RuntimeError, match="not computed as an int8 GEMM.*use --ternary-gemm-backward bf16"):
                y.backward()
        else:
            y.backward()


@single_rank
def test_the_stand_in_is_known_as_a_weight_and_leaves_nothing_behind() -> None:
    model, seen = ternary(Linears(), "int8"), []
    x = torch.randn(3, 1, 64).bfloat16().requires_grad_()
    products = weakref.WeakSet()
    with mock.patch.object(linear, "Int8Product", lambda *given: made(products, Int8Product(*given))):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(is_shadow(t)) or t, lambda t: t):
            y = model(x)
        gc.disable()
        try:
            assert any(seen) and not all(seen) and len(products) == 3
            y.sum().backward()
            del y
            assert not products
        finally:
            gc.enable()


def made(products: weakref.WeakSet, product: Int8Product) -> Int8Product:
    products.add(product)
    return product


@single_rank
def test_inputs_of_another_dtype_and_under_autocast() -> None:
    dense = ternary(Linears(), "int8").dense
    with pytest.raises(RuntimeError, match="dense: an input in torch.float32 for a weight in torch.bfloat16"):
        dense(torch.randn(2, 64))
    x = torch.randn(64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = dense(x)
    assert torch.equal(y, dense(x.detach().bfloat16()))
    y.sum().backward()
    assert x.grad.shape == x.shape


@single_rank
def test_without_gradients_the_same_is_computed() -> None:
    model = ternary(Linears(), "int8")
    x = torch.randn(3, 1, 64).bfloat16()
    expected = model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x), expected)


@single_rank
def test_no_tokens_give_none() -> None:
    model = ternary(Linears(), "int8", gemm_backward="int8")
    x = torch.zeros(0, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    y, _ = model.fc1(x)
    assert y.shape == (0, 1, 128)
    y.sum().backward()
    assert x.grad.shape == x.shape and not model.fc1.weight.grad.any()


@single_rank
def test_the_probe_is_given_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ternary(Linears(), "int8")
    assert probe(model) == 3
    # One-hot inputs are exact in any case; only integers reveal a product that drops low bits of its input.
    monkeypatch.setattr(reference, "integer_product", lambda q, w: torch._int_mm(q & -2 | (q.abs() == 127), w))
    with pytest.raises(ProbeError, match="fc1"):
        probe(model)


@single_rank
def test_a_host_that_multiplies_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ternary(Linears(), "int8")

    def einsum(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)

    monkeypatch.setattr(torch.nn.Linear, "forward", einsum)
    with pytest.raises(RuntimeError, match="dense: this host multiplies .* use --ternary-gemm bf16"):
        model.dense(torch.randn(2, 64).bfloat16())


@single_rank
@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({"group_size": 32}, {}, r"fc1: an int8 GEMM sums a whole row of 64, which has 2 scales"),
        ({}, {"row_parallel_shards": 2}, r"fc2: .* of 128, which has 2 scales here: .*row-parallel-shards"),
        ({}, {"activation_bits": 16}, "needs activation_bits=8"),
        ({}, {"gemm": "int4"}, "gemm='int4' is not possible"),
        ({}, {"gemm": "bf16", "gemm_backward": "int8"}, "needs gemm='int8'"),
    ],
)
def test_what_cannot_be_is_refused(recipe: dict, options: dict, message: str) -> None:
    asked = {"activation_bits": 8, "gemm": "int8", **options}
    with pytest.raises((RecipeError, ValueError), match=message):
        apply_recipe(Linears(), everything(**recipe), default=DEFAULT, **asked)


@single_rank
def test_fp32_is_refused() -> None:
    model = Linears(params_dtype=torch.float32)
    model.dense.float()
    with pytest.raises(RecipeError, match="fc1: an int8 GEMM stands .*not of torch.float32: use --bf16"):
        ternary(model, "int8")


@single_rank
@pytest.mark.slow
def test_torch_compile_leaves_the_layer_as_it_is() -> None:
    dense, x = ternary(Linears(), "int8").dense, torch.randn(2, 64).bfloat16()
    expected = dense(x)
    assert torch.equal(torch.compile(dense, backend="eager")(x), expected)
    dense.weight.grad = None
    torch.compile(dense, backend="eager")(x).sum().backward()
    assert torch.equal(dense.weight.grad, fake_quantize_activations(x).sum(0).expand(32, 64))


def test_quantize_tokens_are_views_of_the_same_activations() -> None:
    x = activations(6, 64, torch.bfloat16).reshape(3, 2, 64)
    tokens = quantize_tokens(x)
    assert torch.equal(tokens.values, fake_quantize_activations(x)) and tokens.codes.shape == (6, 64)
    weight = ternary_weight(16, 64, torch.bfloat16)
    assert torch.equal(int8_linear(tokens, *codes_of(weight)), int8_linear(tokens.values, *codes_of(weight)))


def test_cuda_names_what_it_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.kernels().name in ("triton", "torch")
    monkeypatch.setattr(reference, "_unavailable", lambda device_type: None)
    assert reference.refuses("cuda", 8, 16) is None
    assert "multiples of 8, not 8 x 12: use --ternary-gemm bf16" in reference.refuses("cuda", 8, 12)
    monkeypatch.setattr(reference, "_unavailable", lambda device_type: f"no int8 GEMM on {device_type}")
    assert reference.refuses("cuda", 8, 16) == "no int8 GEMM on cuda"


def test_a_torch_without_the_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_compiled(*arguments) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    assert reference._unavailable.__wrapped__("cpu") is None
    monkeypatch.setattr(torch, "_int_mm", not_compiled)
    assert "no int8 GEMM on cpu (Torch not compiled" in reference._unavailable.__wrapped__("cpu")
