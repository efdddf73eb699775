# SPDX-License-Identifier: Apache-2.0
"""Tests of the binding of the AscendC kernels: its source for NPUs runs on a CPU that stands in for two NPUs."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ascendc import binding, golden
from ascendc.binding import Device, in_a_child

from bitcpm_megatron.inference import packed_linear
from bitcpm_megatron.ops import ascendc, quantize_in_place, registry
from bitcpm_megatron.quantization import SPACES, QuantizerConfig, pack, quantize_dequantize
from bitcpm_megatron.quantization import quantize as quantize_to_codes

# Each check runs in a process of its own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++"),
]

EPS = 1e-5
CONFIG = QuantizerConfig(eps=EPS)


@pytest.fixture(scope="module")
def library() -> Path:
    return binding.build()


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small_weights(count: int, device: str = "npu:0") -> list[torch.Tensor]:
    return [gaussian(2, 64, seed=i).to(device) for i in range(count)]


def quantize(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Quantizes each weight with a launch of its own, like ``bitcpm::fake_quantize``."""
    return [ascendc.quantize_weights([w], [32], CONFIG).quantized[0] for w in weights]


# ----------------------------------------------------------------------------------------------------------- results


def grouped_launch(device: Device) -> None:
    groups = [128, 32, 96, 33, 5000, 4224]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        latent = [gaussian(5, g if g > 128 else 3 * g, dtype, g) for g in groups]
        latent[3] = latent[3][:, :33].contiguous()
        own = [golden.own_scales(w, g, EPS) for w, g in zip(latent, groups, strict=True)]
        previous = [pack(golden.codes(w, 4 * s)) for w, s in zip(latent, own, strict=True)]
        before = device.counts.launches
        made = ascendc.quantize_weights(
            [w.to("npu") for w in latent], groups, CONFIG, previous=[p.to("npu") for p in previous], pack=True
        )
        assert device.counts.launches - before == made.launches == 2
        for i, (w, s, g) in enumerate(zip(latent, own, groups, strict=True)):
            codes = golden.codes(w, s)
            assert golden.same_bits(made.scales[i].cpu(), s), (dtype, g)
            assert golden.same_bits(made.quantized[i].cpu(), golden.quantized(w, s)), (dtype, g)
            assert torch.equal(made.packed[i].cpu(), pack(codes)), (dtype, g)
            changed = (codes != golden.codes(w, 4 * s)).sum()
            assert made.counts[i].cpu().tolist() == [int((codes != 0).sum()), int(changed)], (dtype, g)
            back = ascendc.unpack_weight(made.packed[i], made.scales[i], w.shape[1], g, dtype)
            assert golden.same_bits(back.cpu(), made.quantized[i].cpu()), (dtype, g)
        double = (2 * own[0]).to("npu")
        given = ascendc.quantize_weights([latent[0].to("npu")], [128], CONFIG, [double])
        assert golden.same_bits(given.quantized[0].cpu(), golden.quantized(latent[0], 2 * own[0]))
        assert golden.same_bits(given.scales[0].cpu(), 2 * own[0]) and given.scales[0] is not double


def in_place(device: Device) -> None:
    """The op of training quantizes all weights of a step in place, with two launches and no copy of a weight."""
    groups = [128, 32, -1, 96, -1, -1]
    shapes = [(9, 384), (4, 64), (3, 33), (2, 192), (5, 5000), (1, 4224)]
    latent = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    weights = [w.to("npu") for w in latent]
    # The backend would require torch_npu, which is not installed.
    registry._choices["npu"] = registry.Choice(registry._BACKENDS["ascendc"], "the stand-in")
    blocks, uploads = device.counts.blocks, device.counts.uploads
    for step in range(3):
        for weight, start in zip(weights, latent, strict=True):
            weight.copy_(start * (1 + step))
        launches = device.counts.launches
        scales = quantize_in_place(weights, QuantizerConfig(eps=EPS), groups)
        assert device.counts.launches - launches == 2
        # Blocks are scales and two tables. Tables are copied once, because the weights keep their addresses in every
        # step.
        assert device.counts.blocks - blocks == len(weights) + 2
        assert device.counts.uploads - uploads == 2
        for weight, own, start, group in zip(weights, scales, latent, groups, strict=True):
            expected, theirs = quantize_dequantize(start * (1 + step), QuantizerConfig(group_size=group, eps=EPS))
            assert golden.same_bits(weight.cpu(), expected) and golden.same_bits(own.cpu(), theirs)
        del scales, own


def packed_layers(device: Device) -> None:
    """Rows of packed layers are unpacked on the device for every number of tokens; the device's own product is used.

    The stand-in has neither products nor views; tests on a CPU show that the pieces of a product make up the whole.
    """
    multiplied: list[torch.Tensor] = []

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        multiplied.append(weight.cpu())
        return torch.nn.functional.linear(x.cpu(), multiplied[-1]).to(weight.device)

    ascendc.unavailable = lambda device_type: None  # it would require torch_npu, which is not installed
    packed_linear.linear = product
    packed_linear._DECODED_ELEMENTS = 4 * 384
    for columns, group in ((384, 128), (384, 32), (33, -1)):
        codes, scales = quantize_to_codes(gaussian(9, columns, torch.float32), QuantizerConfig(group_size=group))
        layer = packed_linear.PackedTernaryLinear(pack(codes), scales, columns)
        on_device = packed_linear.PackedTernaryLinear(layer.packed.to("npu"), layer.scales.to("npu"), columns)
        for dtype in (torch.bfloat16, torch.float32):
            weight = on_device.weight(dtype)
            assert weight.device.type == "npu" and golden.same_bits(weight.cpu(), layer.weight(dtype))
            for tokens in (1, 33):
                launches = device.counts.launches
                on_device(gaussian(tokens, columns, dtype).to("npu"))
                assert device.counts.launches - launches == len(multiplied) == (1 if columns == 33 else 3)
                assert {len(rows) for rows in multiplied} <= {4, 1, 9}
                multiplied.clear()


def other_quantizers(device: Device) -> None:
    """The ops of training quantize with every space and scale, and with given scales."""
    registry._choices["npu"] = registry.Choice(registry._BACKENDS["ascendc"], "the stand-in")
    latent = [gaussian(9, 384), gaussian(3, 33, seed=1), gaussian(2, 4224, seed=2)]
    for space, (statistic, multiplier) in itertools.product(SPACES, ((None, None), ("absmean", 1.55), ("absmax", 0.4))):
        config = QuantizerConfig(space, -1, EPS, statistic, multiplier)
        weights = [w.to("npu") for w in latent]
        scales = quantize_in_place(weights, config, [128, -1, -1])
        for weight, own, start, group in zip(weights, scales, latent, [128, -1, -1], strict=True):
            expected, theirs = quantize_dequantize(start, replace(config, group_size=group))
            assert golden.same_bits(weight.cpu(), expected) and golden.same_bits(own.cpu(), theirs), config
        for w, s in zip(latent, scales, strict=True):
            group = w.shape[1] // s.shape[1]
            one = ascendc.quantize_weights([w.to("npu")], [group], config, [s])
            expected = quantize_dequantize(
                w, replace(config, group_size=-1 if group == w.shape[1] else group), s.cpu()
            )[0]
            assert golden.same_bits(one.quantized[0].cpu(), expected), config


def wrong_tensors(device: Device) -> None:
    op = torch.ops.bitcpm.ascendc_quantize
    w = gaussian(2, 64).to("npu:0")
    scales = torch.ones(2, 2, dtype=torch.bfloat16)
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    q, one = torch.empty_like(w), torch.ones(2, 2, dtype=torch.bfloat16).to("npu:0")
    for lists, message in (
        (([w, w.to("npu:1")], [q, q], [one, one], [], []), "weight 1: not a contiguous matrix on the first"),
        (([w], [q.to("npu:1")], [one], [], []), "weight 0: the quantized values do not fit"),
        (([w], [q.float()], [one], [], []), "weight 0: the quantized values do not fit"),
        (([w], [q], [scales.to("npu:1")], [], []), "weight 0: the scales do not fit"),
        (([w], [q], [scales.T.flatten().to("npu:0")], [], []), "weight 0: the scales do not fit"),
        (([w], [q], [], [], []), "one quantized weight per weight, and its scales"),
        (([w], [q], [one], [codes.to("npu:1")], []), "weight 0: the packed codes do not fit"),
        (([w], [q], [one], [], [codes.to("npu:1")]), "weight 0: the previous codes do not fit"),
        (([w.int()], [q], [one], [], []), "take bf16, fp16 and fp32"),
        (([], [w.int()], [one], [], []), "take bf16, fp16 and fp32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*lists, [32] * max(1, len(lists[0])), EPS, 1.0, False, [], [], 0, False, False)
    with pytest.raises(RuntimeError, match="scales do not fit the packed codes"):
        torch.ops.bitcpm.ascendc_unpack(codes.to("npu:0"), scales.to("npu:1"), 64, torch.float32)
    for space in (([0.5], [0.0], 0), ([0.5] * 5, [0.0] * 6, 0), ([], [1.0], 0), ([0.5], [0.0, 1.0], 2), ([], [], -1)):
        with pytest.raises(RuntimeError, match="levels, . thresholds and the ties .* are no space"):
            op([w], [q], [one], [], [], [32], EPS, 1.0, False, *space, False, False)
    # The Python side checks this, too, with a message that names the space.
    with pytest.raises(RuntimeError, match="packing, unpacking and counting know ternary codes alone"):
        op([w], [q], [one], [], [], [32], EPS, 1.0, False, [0.0], [-1.0, 1.0], 1, False, True)
    assert device.counts.launches == 0


# --------------------------------------------------------------------------------------------------- failing launches


def failing_launch(device: Device) -> None:
    w = gaussian(2, 64).to("npu")
    quantized = ascendc.quantize_weights([w], [32], CONFIG, pack=True)
    device.set_launches(status=507899)
    for call, kernel in (
        (lambda: quantize([w]), "ternary_tile_bf16"),
        (lambda: ascendc.quantize_weights([gaussian(1, 33).float().to("npu")], [33], CONFIG), "ternary_rows_fp32"),
        (lambda: ascendc.unpack_weight(quantized.packed[0], quantized.scales[0], 64, 32, torch.half), "tile_fp16"),
    ):
        with pytest.raises(RuntimeError, match=f"ternary kernels: .*{kernel} was not launched: aclError 507899"):
            call()
    device.set_launches()
    quantize([w])


# ------------------------------------------------------------------------------------------------------------- tables


def tables_over_steps(device: Device) -> None:
    weights = small_weights(200)
    for _step in range(3):
        results = quantize(weights)  # all results exist until the end of the step
        assert device.counts.uploads == 200
        del results
    assert device.counts.launches == 600
    assert device.counts.waiting_uploads == device.counts.queue_waits == 0
    assert golden.same_bits(
        quantize(weights[:1])[0].cpu(), golden.quantized(gaussian(2, 64), golden.own_scales(gaussian(2, 64), 32, EPS))
    )


def tables_are_dropped_at_last(device: Device) -> None:
    forgotten, used = small_weights(2)
    quantize([forgotten])
    quantize([used])
    device.set_launches(compute=False)
    many = [used] * 2000
    groups = [32] * len(many)
    words = 2000 * 23 + 28

    def launch(i: int) -> None:
        ascendc.quantize_weights(many, groups, QuantizerConfig(eps=EPS * (1 + i)))

    most = (4 << 20) // words
    for i in range(most + 20):
        launch(i)
        quantize([used])
    # The blocks are those of the two weights, of the large tables that fit, and of the small table.
    assert device.counts.blocks == 2 + most + 1
    assert device.counts.uploads == 2 + most + 20
    uploads = device.counts.uploads
    launch(most + 19)
    assert device.counts.uploads == uploads
    quantize([forgotten])
    launch(0)
    assert device.counts.uploads == uploads + 2


def tables_of_streams_and_devices(device: Device) -> None:
    (weight,) = small_weights(1)
    quantize([weight])
    device.set_stream(7)
    quantize([weight])
    quantize([weight])
    assert device.counts.uploads == 2, "a table serves the stream that it was copied on"
    device.set_stream(0)
    quantize([weight])
    assert device.counts.uploads == 2
    # The current device remains the first one.
    other = weight.to("npu:1")
    scales = ascendc.quantize_weights([other], [32], CONFIG, pack=True)
    back = ascendc.unpack_weight(scales.packed[0], scales.scales[0], 64, 32, torch.bfloat16)
    assert {t.device.index for t in (*scales.quantized, *scales.scales, *scales.packed, back)} == {1}
    assert torch.empty(1, device="npu").device.index == 0
    assert device.counts.stray_launches == 0
    assert golden.same_bits(back.cpu(), quantize([weight])[0].cpu())


# ------------------------------------------------------------------------------------------------------------- graphs


def capture(device: Device) -> None:
    weight, unknown = small_weights(2)
    quantize([weight])
    uploads = device.counts.uploads
    device.set_stream(5)
    device.set_capture(True)
    first = quantize([weight])[0]
    with pytest.raises(RuntimeError, match="being captured must not copy it: run one step on the same weights"):
        quantize([unknown])
    assert device.counts.uploads == uploads and device.counts.stray_uploads == 0
    device.set_capture(False)
    quantize([unknown])
    assert device.counts.uploads == uploads + 1
    assert golden.same_bits(first.cpu(), golden.quantized(gaussian(2, 64), golden.own_scales(gaussian(2, 64), 32, EPS)))


def a_captured_table_stays(device: Device) -> None:
    (weight,) = small_weights(1)
    quantize([weight])
    device.set_capture(True)
    quantize([weight])
    device.set_capture(False)
    device.set_launches(compute=False)
    many = [weight] * 2000
    for i in range(120):  # more tables than the cache can hold
        ascendc.quantize_weights(many, [32] * len(many), QuantizerConfig(eps=EPS * (1 + i)))
    uploads = device.counts.uploads
    quantize([weight])
    assert device.counts.uploads == uploads, "the graph holds its address"


def chips_without_graphs(device: Device) -> None:
    weights = small_weights(1)
    device.set_capture(True, status=207000)
    quantize(weights)
    assert device.counts.uploads == 1
    device.set_capture(False, status=107003)
    with pytest.raises(RuntimeError, match="not known whether a graph is being captured: aclError 107003"):
        quantize(weights)


@pytest.mark.parametrize(
    "check",
    [
        grouped_launch,
        in_place,
        packed_layers,
        other_quantizers,
        wrong_tensors,
        failing_launch,
        tables_over_steps,
        tables_are_dropped_at_last,
        tables_of_streams_and_devices,
        capture,
        a_captured_table_stays,
        chips_without_graphs,
    ],
    ids=lambda check: check.__name__,
)
def test_binding(library: Path, check: Callable[[Device], None]) -> None:
    in_a_child(check, library)


def test_a_failing_check_is_told(library: Path) -> None:
    with pytest.raises(AssertionError, match="assert device.counts.launches == 1"):
        in_a_child(_expects_a_launch, library)


def _expects_a_launch(device: Device) -> None:
    assert device.counts.launches == 1
