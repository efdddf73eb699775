# SPDX-License-Identifier: Apache-2.0
"""Tests of the AscendC backend's Python side, and of training with its emulated kernels."""

import importlib.util
import shutil
from dataclasses import astuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_gpt
from support.grouped import LATENTS, Latent, check_together
from torch._subclasses.fake_tensor import FakeTensorMode

from bitcpm_megatron import QuantizerConfig, fake_quantize
from bitcpm_megatron.ops import active_backend, ascendc, backends, registry, set_backend
from bitcpm_megatron.quantization import SPACES, packed_size

EMULATED = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")


@pytest.fixture(autouse=True)
def same_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(registry, "_requested", registry._requested)
    monkeypatch.setattr(registry, "_choices", {})


# ------------------------------------------------------------------------------------------------------ availability


def test_elsewhere_than_on_an_npu_it_says_so() -> None:
    backend = {b.name: b for b in backends()}["ascendc"]
    for device in ("cpu", "cuda"):
        assert backend.unavailable(device) == "runs on an NPU only"
        with pytest.raises(ValueError, match="'ascendc' was asked for.*runs on an NPU only"):
            set_backend("ascendc", device)
    assert active_backend("cpu").backend.name in ("cpu", "torch")


def test_on_an_npu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    present = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ascendc.unavailable("npu") == "torch_npu is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: present)
    library = tmp_path / "libbitcpm_ascendc.so"
    monkeypatch.setenv(ascendc.LIBRARY_VARIABLE, str(library))
    assert "is not built: make kernel" in ascendc.unavailable("npu") and str(library) in ascendc.unavailable("npu")
    library.touch()
    assert ascendc.unavailable("npu") is None


def test_the_library_of_the_checkout_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ascendc.LIBRARY_VARIABLE, raising=False)
    assert ascendc.library_path().parts[-3:] == ("build", "ascendc", "libbitcpm_ascendc.so")


def test_shapes_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascendc, "load", lambda: None)
    with FakeTensorMode():
        weights = [torch.empty(6, 192, dtype=torch.bfloat16), torch.empty(4, 100, dtype=torch.bfloat16)]
        made = ascendc.quantize_weights(weights, [32, 100], QuantizerConfig(), pack=True, count=True)
        quantized, scales, packed, counts = made.quantized, made.scales, made.packed, made.counts
        assert [tuple(t.shape) for t in quantized] == [(6, 192), (4, 100)]
        assert [tuple(t.shape) for t in scales] == [(6, 6), (4, 1)] and scales[0].dtype == torch.bfloat16
        assert [tuple(t.shape) for t in packed] == [(6, packed_size(192)), (4, packed_size(100))]
        assert [tuple(t.shape) for t in counts] == [(2,), (2,)]
        made = ascendc.quantize_weights(weights, [32, 100], QuantizerConfig())
        assert (made.packed, made.counts) == ([], []) and made.launches <= 2
        back = torch.ops.bitcpm.ascendc_unpack(packed[0], scales[0], 192, torch.float16)
        assert tuple(back.shape) == (6, 192) and back.dtype == torch.float16


def test_bad_weights_are_refused_before_the_library_is_needed() -> None:
    with pytest.raises(ValueError, match="group_size=64 does not divide"):
        ascendc.quantize_weights([torch.zeros(2, 96)], [64], QuantizerConfig())
    with pytest.raises(ValueError, match="pack, count and compare ternary codes, not those of 'five-value': leave out"):
        ascendc.quantize_weights([torch.zeros(2, 96)], [96], QuantizerConfig("five-value"), count=True)
    with pytest.raises(ValueError, match=r"scales of shape \(2, 1\): pass \(2, 3\)"):
        ascendc.unpack_weight(
            torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.bfloat16), 96, 32, torch.bfloat16
        )


# ---------------------------------------------------------------------------------------------------------- emulated


@pytest.mark.slow
@EMULATED
def test_the_emulated_backend_serves_the_op_by_name_only() -> None:
    from ascendc import emulated_backend

    emulated_backend.register()
    assert active_backend("cpu").backend.name in ("cpu", "torch")
    with pytest.raises(ValueError, match="emulates on a CPU only"):
        set_backend(emulated_backend.NAME, "cuda")
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize(weight, QuantizerConfig(group_size=32))
    set_backend(emulated_backend.NAME, "cpu")
    leaf = weight.clone().t().contiguous().t().requires_grad_()
    quantized = fake_quantize(leaf, QuantizerConfig(group_size=32))
    assert torch.equal(quantized, expected)
    quantized.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    torch.library.opcheck(
        torch.ops.bitcpm.fake_quantize.default, (leaf, *astuple(QuantizerConfig(group_size=32)), None)
    )


@EMULATED
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    latents=LATENTS,
    space=st.sampled_from(list(SPACES)),
    scale=st.sampled_from([(None, None), ("absmean", 1.0), ("absmean", 1.55), ("absmax", 0.4)]),
)
def test_together_as_each_alone(latents: list[Latent], space: str, scale: tuple[str | None, float | None]) -> None:
    from ascendc import emulated_backend

    emulated_backend.register()
    set_backend(emulated_backend.NAME, "cpu")
    check_together(latents, QuantizerConfig(space, -1, 1e-5, *scale))


@EMULATED
@pytest.mark.parametrize("group_size", [-1, 32])
def test_training_gives_the_losses_of_the_torch_backend(single_rank: None, group_size: int) -> None:
    from ascendc import emulated_backend

    emulated_backend.register()
    theirs, ours = (tiny_gpt.train(name, "cpu", group_size) for name in ("torch", emulated_backend.NAME))
    tiny_gpt.assert_equal(ours, theirs)
