# SPDX-License-Identifier: Apache-2.0
"""Tests of the registered op: schema, fake kernel, straight-through gradient, compilation, choice of a backend.

``test_quantizer.py`` tests the values themselves; here the op must give the same values in every way it is called.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grouped import LATENTS, Latent, check_together, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode

from bitcpm_megatron import QuantizerConfig, dequantize, fake_quantize, quantize
from bitcpm_megatron.ops import (
    Backend,
    active_backend,
    backends,
    counts,
    quantize_all,
    quantize_in_place,
    quantize_weight,
    register_backend,
    registry,
    set_backend,
)
from bitcpm_megatron.quantization import SPACES, Space, quantize_dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.bitcpm.fake_quantize
ALL = torch.ops.bitcpm.fake_quantize_all


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantizer(group: int, eps: float = QuantizerConfig.eps) -> tuple[str, int, float, str, float]:
    """Returns the arguments of the op that describe a quantizer."""
    return "ternary", group, eps, "absmean", 1.0


# ------------------------------------------------------------------------------------------------ schema and values


def test_schema() -> None:
    expected = (
        "(Tensor weight, str space, SymInt group_size, float eps, str statistic, float scale_multiplier, Tensor? "
        "scale) -> (Tensor, Tensor)"
    )
    assert str(OP.default._schema) == "bitcpm::fake_quantize" + expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.verifies(
    "quantizer",
    "the registered op passes PyTorch's `opcheck`, and `torch.compile` traces a layer that uses it",
)
def test_opcheck(dtype: torch.dtype, with_scale: bool, group: int) -> None:
    weight = gaussian(6, 64, dtype).requires_grad_()
    scale = quantize(weight, QuantizerConfig(group_size=group))[1] * 2 if with_scale else None
    torch.library.opcheck(OP.default, (weight, *quantizer(group), scale))


def test_opcheck_of_a_transposed_weight() -> None:
    torch.library.opcheck(OP.default, (gaussian(64, 6).t().requires_grad_(), *quantizer(32), None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "transpose"), [(-1, False), (32, False), (-1, True)])
def test_values_are_those_of_the_reference(dtype: torch.dtype, group: int, transpose: bool) -> None:
    weight = gaussian(64, 64, dtype, 1)
    weight[3] = -0.0
    weight = weight.t() if transpose else weight
    before = weight.clone()
    config = QuantizerConfig(group_size=group, eps=2.0**-10)
    codes, scales = quantize(weight, config)
    expected = dequantize(codes, scales, config, dtype)
    assert len(codes.unique()) == 3
    assert same_bits(fake_quantize(weight, config), expected)
    quantized, found = OP(weight, *quantizer(group, config.eps), None)
    assert same_bits(quantized, expected) and torch.equal(found, scales)

    double = scales * 2
    quantized, found = OP(weight, *quantizer(group, config.eps), double)
    assert same_bits(quantized, dequantize(*quantize(weight, config, double), config, dtype))
    assert not torch.equal(quantized, expected)
    assert torch.equal(found, double)
    assert found.untyped_storage().data_ptr() != double.untyped_storage().data_ptr()
    assert same_bits(weight, before)


def test_the_config_reaches_the_op() -> None:
    weight = torch.zeros(2, 64)
    weight[:, 0] = 1.0
    assert fake_quantize(weight, QuantizerConfig())[0, 0] == 2.0**-6
    assert fake_quantize(weight, QuantizerConfig(group_size=32))[0, 0] == 2.0**-5
    assert fake_quantize(weight, QuantizerConfig(eps=0.25))[0, 0] == 0.25


def test_a_space_that_the_op_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    five = Space("five", (-2.0, -1.0, 0.0, 1.0, 2.0), (-1.5, -0.5, 0.5, 1.5), ("lower", "upper") * 2)
    monkeypatch.setitem(SPACES, "five", five)
    # The op must not silently quantize to ternary when another space was requested.
    with pytest.raises(ValueError, match="quantizes to ternary, .*, not to 'five': use quantize and dequantize"):
        fake_quantize(gaussian(2, 64), QuantizerConfig(space="five"))


@pytest.mark.parametrize(
    ("weight", "group", "scale", "cure"),
    [
        (torch.zeros(64), -1, None, r"\(64,\).*matrix"),
        (torch.zeros(0, 64), -1, None, r"\(0, 64\).*empty"),
        (torch.zeros(2, 64, dtype=torch.float64), -1, None, r"float64.*\(2, 64\).*cast it to"),
        (torch.zeros(2, 64, dtype=torch.int8), -1, None, r"int8.*\(2, 64\).*cast it to"),
        (torch.zeros(2, 96), 64, None, r"group_size=64.*96.*use -1 or one of"),
        (torch.zeros(2, 96), 0, None, r"group_size=0.*use -1"),
        (torch.zeros(2, 64), 32, torch.ones(2, 1, dtype=torch.bfloat16), r"\(2, 1\).*pass bfloat16 of shape \(2, 2\)"),
        (torch.zeros(2, 64), 32, torch.ones(2, 2), r"float32.*pass bfloat16 of shape \(2, 2\)"),
    ],
)
def test_bad_input_is_refused_by_the_kernel_and_by_its_fake(
    weight: torch.Tensor, group: int, scale: torch.Tensor | None, cure: str
) -> None:
    with pytest.raises(ValueError, match=cure):
        OP(weight, *quantizer(group), scale)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=cure):
        OP(mode.from_tensor(weight), *quantizer(group), None if scale is None else mode.from_tensor(scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_fake_tensors_have_the_layout_of_the_real_ones(dtype: torch.dtype, transpose: bool) -> None:
    weight = gaussian(64, 96, dtype)
    weight = weight.t() if transpose else weight
    real = OP(weight, *quantizer(32), None)
    with FakeTensorMode() as mode:
        fake = OP(mode.from_tensor(weight), *quantizer(32), None)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    assert fake[1].shape == (weight.shape[0], weight.shape[1] // 32) and fake[1].dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- many weights


@pytest.fixture(scope="module", params=["torch", "cpu", "one by one"])
def serving(request: pytest.FixtureRequest) -> Backend:
    """Selects a backend for the CPU during the module's tests: those of a CPU, and one without a grouped kernel."""
    before, known = registry._requested, dict(registry._BACKENDS)
    register_backend(Backend("one by one", quantize_dequantize, lambda device: None, None))
    reason = {b.name: b for b in backends()}[request.param].unavailable("cpu")
    if reason is not None:
        pytest.skip(f"{reason}; apt-get install gcc, then make test")
    yield set_backend(request.param, "cpu").backend
    registry._BACKENDS.clear()
    registry._BACKENDS.update(known)
    set_backend(before, "cpu")


@settings(max_examples=100, deadline=None)
@given(latents=LATENTS, eps=st.sampled_from([QuantizerConfig.eps, 2.0**-100, 0.25]))
def test_together_as_each_alone(serving: Backend, latents: list[Latent], eps: float) -> None:
    check_together(latents, QuantizerConfig(eps=eps))


def test_a_weight_that_is_quantized_in_place_is_a_slice_of_something(serving: Backend) -> None:
    """The weight is at an odd address, as in a buffer of parameters, and its surroundings are not changed."""
    buffer = gaussian(1, 4000, torch.bfloat16).flatten()
    before = buffer.clone()
    pieces = [buffer[7 : 7 + 5 * 33].view(5, 33), buffer[1001 : 1001 + 640].view(10, 64)]
    expected = [quantize_dequantize(piece, QuantizerConfig())[0].flatten() for piece in pieces]
    quantize_in_place(pieces, QuantizerConfig())
    assert same_bits(buffer, torch.cat([before[:7], expected[0], before[172:1001], expected[1], before[1641:]]))


def test_how_often_the_kernel_was_launched(serving: Backend) -> None:
    weights = [gaussian(4, 64), gaussian(2, 33), gaussian(3, 256)]
    scales = [torch.empty(w.shape[0], 1, dtype=torch.bfloat16) for w in weights]
    launches = serving.together(weights, weights, scales, [-1] * 3, QuantizerConfig())
    assert launches == (1 if serving.name == "cpu" else 3)


def test_calls_and_launches_are_counted(serving: Backend) -> None:
    """Weights quantized together, outside any autograd graph, equal those quantized one by one."""
    weights = [gaussian(4, 64).requires_grad_(), gaussian(2, 96).t(), gaussian(3, 256, torch.bfloat16)]
    sizes, before = [32, -1, 128], replace(counts)
    quantized, scales = quantize_all(weights, QuantizerConfig(eps=0.5), sizes)
    assert counts.calls - before.calls == 1
    assert counts.launches - before.launches == (2 if serving.name == "cpu" else 3), "one for each dtype, or weight"
    for weight, size, *made in zip(weights, sizes, quantized, scales, strict=True):
        alone = quantize_weight(weight.detach(), QuantizerConfig(group_size=size, eps=0.5))
        assert all(same_bits(m, a) and not m.requires_grad for m, a in zip(made, alone, strict=True))
    assert (counts.calls - before.calls, quantize_all([], QuantizerConfig())) == (1 + 3, ([], []))


def in_lists(in_place: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Returns two weights, the tensors for the results, and the tensors for the scales."""
    weights = [gaussian(4, 64), gaussian(2, 96, torch.bfloat16)]
    scales = [torch.empty(4, 1, dtype=torch.bfloat16), torch.empty(2, 3, dtype=torch.bfloat16)]
    return ([], weights, scales) if in_place else (weights, [torch.empty_like(w) for w in weights], scales)


def test_schema_of_many() -> None:
    expected = (
        "(Tensor[] weights, Tensor(a!)[] quantized, Tensor(b!)[] scales, str space, int[] group_sizes, float eps, "
        "str statistic, float scale_multiplier) -> ()"
    )
    assert str(ALL.default._schema) == "bitcpm::fake_quantize_all" + expected


@pytest.mark.parametrize("in_place", [False, True])
def test_opcheck_of_many(in_place: bool) -> None:
    torch.library.opcheck(ALL.default, (*in_lists(in_place), "ternary", [-1, 32], 1e-5, "absmean", 1.0))
    with SchemaCheckMode():
        ALL(*in_lists(in_place), "ternary", [-1, 32], 1e-5, "absmean", 1.0)


def test_a_parameter_that_was_quantized_in_place_is_known_to_have_changed() -> None:
    weight = torch.nn.Parameter(gaussian(4, 64))
    x = gaussian(2, 64).requires_grad_()
    out = torch.nn.functional.linear(x, weight)
    quantize_in_place([weight.detach()], QuantizerConfig())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda weights, quantized, scales: scales.pop(), "1 scales and 2 group sizes: pass as many of each"),
        (lambda weights, quantized, scales: weights.pop(), "1 weights, 2 to be written"),
        (lambda weights, quantized, scales: quantized.reverse(), r"\(2, 96\), torch.bfloat16 on cpu: pass \(4, 64\)"),
        (lambda weights, quantized, scales: scales.reverse(), r"do not fit a weight of shape \(4, 64\)"),
        (lambda weights, quantized, scales: quantized.append(quantized.pop().t().contiguous().t()), "not contiguous"),
        (lambda weights, quantized, scales: weights.append(weights.pop().double()), "float64"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_the_kernel_and_by_its_fake(change, cure: str) -> None:
    lists = in_lists(in_place=False)
    change(*lists)
    with pytest.raises(ValueError, match=cure):
        ALL(*lists, "ternary", [-1, 32], 1e-5, "absmean", 1.0)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=cure):
        ALL(*([mode.from_tensor(t) for t in ts] for ts in lists), "ternary", [-1, 32], 1e-5, "absmean", 1.0)


def test_in_place_the_cure_comes_before_anything_is_written() -> None:
    weights = [gaussian(4, 64), gaussian(64, 4).t()]
    before = [w.clone() for w in weights]
    with pytest.raises(ValueError, match=r"\(4, 64\), is not contiguous"):
        quantize_in_place(weights, QuantizerConfig())
    with pytest.raises(ValueError, match="group_size=128 does not divide a row of 64"):
        quantize_in_place(weights[:1], QuantizerConfig(group_size=128))
    assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))
    assert quantize_in_place([], QuantizerConfig()) == []


def test_weights_of_two_dtypes_share_no_launch(own_registry: None) -> None:
    seen = []

    def grouped(
        weights: Sequence[torch.Tensor],
        quantized: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        group_sizes: Sequence[int],
        config: QuantizerConfig,
    ) -> int:
        seen.append([(tuple(w.shape), w.dtype, size) for w, size in zip(weights, group_sizes, strict=True)])
        assert all(w is q for w, q in zip(weights, quantized, strict=True)) and config.eps == 0.25
        return 1

    register_backend(replace(backend("fast", 10), grouped=grouped))
    weights = [gaussian(4, 64), gaussian(2, 96, torch.bfloat16), gaussian(3, 32)]
    quantize_in_place(weights, QuantizerConfig(eps=0.25), [-1, 32, 32])
    assert seen == [
        [((4, 64), torch.float32, -1), ((3, 32), torch.float32, 32)],
        [((2, 96), torch.bfloat16, 32)],
    ]


# --------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [False, True])
def test_the_gradient_passes_unchanged(dtype: torch.dtype, with_scale: bool) -> None:
    # There are zeros, clamped values and codes 0; upstream gradients have all sizes, signed zeros and an infinity.
    weight = gaussian(8, 64, dtype, 2)
    weight[0] = 0.0
    weight[1] *= 100
    weight.requires_grad_()
    scale = quantize(weight, QuantizerConfig(group_size=32))[1] * 0.7 if with_scale else None
    upstream = gaussian(8, 64, dtype, 3) * 10 ** torch.linspace(-6, 4, 64).to(dtype)
    upstream[2, :3] = torch.tensor([-0.0, float("inf"), 0.0])
    quantized, scales = OP(weight, *quantizer(32), scale)
    quantized.backward(upstream)
    assert same_bits(weight.grad, upstream)
    assert not scales.requires_grad and scales.grad_fn is None


def test_gradients_of_a_transposed_weight_and_of_a_sum() -> None:
    weight = gaussian(64, 8, seed=4).requires_grad_()
    upstream = gaussian(64, 8, seed=5).t()
    fake_quantize(weight.t(), QuantizerConfig()).backward(upstream)
    assert same_bits(weight.grad, upstream.t().contiguous())
    weight.grad = None
    fake_quantize(weight.t(), QuantizerConfig()).sum().backward()
    assert (weight.grad == 1).all()


def test_gradients_accumulate_over_uses() -> None:
    weight = gaussian(4, 64, seed=6).requires_grad_()
    a, b = gaussian(4, 64, seed=7), gaussian(4, 64, seed=8)
    (fake_quantize(weight, QuantizerConfig()) * a).sum().backward()
    (fake_quantize(weight, QuantizerConfig()) * b).sum().backward()
    assert torch.equal(weight.grad, a + b)


def test_the_scales_are_not_differentiable() -> None:
    weight = gaussian(4, 64).requires_grad_()
    given = torch.ones(4, 1, dtype=torch.bfloat16, requires_grad=True)
    quantized, scales = OP(weight, *quantizer(-1), given)
    assert quantized.requires_grad and not scales.requires_grad
    (quantized.sum() + scales.float().sum()).backward()
    assert (weight.grad == 1).all() and given.grad is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        OP(weight, *quantizer(-1), None)[1].sum().backward()


def test_a_frozen_weight_gives_no_graph() -> None:
    assert not fake_quantize(gaussian(4, 64), QuantizerConfig()).requires_grad
    with torch.no_grad():
        assert not fake_quantize(gaussian(4, 64).requires_grad_(), QuantizerConfig()).requires_grad


def test_nothing_is_saved_for_the_backward() -> None:
    saved = []
    weight = gaussian(4, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(weight, QuantizerConfig())
        assert not saved
        weight.square()  # the hook does see what other operations save
    assert len(saved) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_linear_equals_eager(dtype: torch.dtype, dynamic: bool) -> None:
    config = QuantizerConfig(group_size=32)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, fake_quantize(weight, config)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, columns in ((48, 64), (40, 96)):
        results = []
        for function in (linear, compiled):
            x = gaussian(16, columns, dtype, 9).requires_grad_()
            weight = gaussian(rows, columns, dtype, 10).requires_grad_()
            out = function(x, weight)
            out.backward()
            results.append((out.detach(), x.grad, weight.grad))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        # The straight-through weight gradient is also computed directly, in case both are wrong in the same way.
        wq = dequantize(*quantize(gaussian(rows, columns, dtype, 10), config), config, dtype)
        x = gaussian(16, columns, dtype, 9)
        wq.requires_grad_()
        torch.nn.functional.linear(x, wq).square().sum().backward()
        assert same_bits(results[1][2], wq.grad)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------- backends


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provides a registry with only the torch backend; changes to it end with the test."""
    monkeypatch.setattr(registry, "_BACKENDS", {"torch": registry._BACKENDS["torch"]})
    monkeypatch.setattr(registry, "_requested", "auto")
    monkeypatch.setattr(registry, "_choices", {})


def backend(name: str, priority: int | None, reason: str | None = None, only: str | None = None) -> Backend:
    """Returns a backend that fills the weight with its priority, so that the values show which backend ran.

    ``reason`` is why it cannot run on the device type ``only``, or on any device type if ``only`` is None.
    """

    def kernel(
        weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(weight, priority or 0), torch.ones(weight.shape[0], 1, dtype=torch.bfloat16)

    return Backend(name, kernel, lambda device: reason if only in (None, device) else None, priority)


def test_the_torch_backend_is_there_and_runs_everywhere(own_registry: None) -> None:
    assert [b.name for b in backends()] == ["torch"]
    for device_type in ("cpu", "cuda", "npu"):
        choice = active_backend(device_type)
        assert choice.backend.name == "torch" and choice.reason == "best available"


def test_auto_takes_the_highest_priority_that_can_run_and_says_why(own_registry: None) -> None:
    weight = gaussian(2, 64)
    register_backend(backend("slow", -5))
    register_backend(backend("fast", 10))
    register_backend(backend("fastest", 20, "no such chip", only="cpu"))
    assert [b.name for b in backends()] == ["fastest", "fast", "torch", "slow"]
    choice = active_backend("cpu")
    assert choice.backend.name == "fast"
    assert "best available" in choice.reason and "fastest: no such chip" in choice.reason
    assert (fake_quantize(weight, QuantizerConfig()) == 10).all()
    # Each device type has a choice of its own.
    assert active_backend("cuda").backend.name == "fastest" and "no such chip" not in active_backend("cuda").reason
    assert active_backend("cpu").backend.name == "fast"
    assert set_backend("auto", "cpu") == choice


def test_a_later_backend_is_taken_at_once(own_registry: None) -> None:
    assert active_backend("cpu").backend.name == "torch"
    register_backend(backend("late", 3))
    assert active_backend("cpu").backend.name == "late"
    register_backend(backend("late", -3))
    assert active_backend("cpu").backend.name == "torch" and len(backends()) == 2


def test_a_backend_by_name(own_registry: None) -> None:
    weight = gaussian(2, 64)
    register_backend(backend("fast", 10))
    choice = set_backend("torch", "cpu")
    assert choice.backend.name == "torch" and "by name" in choice.reason
    assert fake_quantize(weight, QuantizerConfig()).unique().numel() > 3
    assert set_backend("fast", "cpu").backend.name == "fast"
    assert (fake_quantize(weight, QuantizerConfig()) == 10).all()
    set_backend("torch", "cpu")
    assert set_backend("auto", "cpu").backend.name == "fast"


def test_a_backend_without_priority_runs_by_name_only(own_registry: None) -> None:
    register_backend(backend("emulated", None))
    register_backend(backend("slow", -5))
    assert [b.name for b in backends()] == ["torch", "slow", "emulated"]
    choice = set_backend("auto", "cpu")
    assert choice.backend.name == "torch" and "not emulated: only by name" in choice.reason
    assert set_backend("emulated", "cpu").reason == "asked for by name"
    assert (fake_quantize(gaussian(2, 64), QuantizerConfig()) == 0).all()
    register_backend(backend("emulated", None, "not built"))
    assert "not emulated: not built" in set_backend("auto", "cpu").reason


@pytest.mark.parametrize("before", ["auto", "fast", "torch"])
def test_an_unknown_backend_is_an_error_and_changes_nothing(before: str, own_registry: None) -> None:
    register_backend(backend("fast", 10))
    choice = set_backend(before, "cpu")
    with pytest.raises(ValueError, match="'magic'.*auto.*'fast', 'torch'"):
        set_backend("magic", "cpu")
    assert active_backend("cpu") == choice


@pytest.mark.parametrize("before", ["auto", "fast", "torch"])
def test_an_unavailable_backend_is_an_error_and_changes_nothing(before: str, own_registry: None) -> None:
    register_backend(backend("fast", 10))
    register_backend(backend("chip", 20, "no such chip", only="cpu"))
    choice = set_backend(before, "cpu")
    with pytest.raises(ValueError, match=r"'chip'.*cannot run on cpu: no such chip.*\['fast', 'torch'\]"):
        set_backend("chip", "cpu")
    assert active_backend("cpu") == choice
    assert (fake_quantize(gaussian(2, 64), QuantizerConfig()) == 10).all() == (before != "torch")


def test_a_probe_that_fails_changes_nothing(own_registry: None) -> None:
    def probe(device_type: str) -> str | None:
        raise OSError("driver too old")

    choice = set_backend("torch", "cpu")
    register_backend(Backend("broken", backend("broken", 1).kernel, probe))
    with pytest.raises(OSError, match="driver too old"):
        set_backend("broken", "cpu")
    assert registry._requested == choice.backend.name


def test_a_named_backend_never_gives_way_to_another_on_a_device_it_cannot_serve(own_registry: None) -> None:
    register_backend(backend("chip", 20, "needs the chip", only="cpu"))
    set_backend("chip", "npu")
    with pytest.raises(ValueError, match="'chip'.*cpu: needs the chip"):
        fake_quantize(gaussian(2, 64), QuantizerConfig())
