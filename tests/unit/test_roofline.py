# SPDX-License-Identifier: Apache-2.0
"""Tests of the cost model: numbers computed by hand, and properties that hold for all numbers."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import roofline
import torch
from cost import calibration, validation
from cost import model as cost_model
from cost.workload import MACHINES, PRESETS, BadInput, Machine, Workload, preset
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.launch.estimates.shapes import Layout

# A layer has qkv 128 x 64, proj 64 x 64, fc1 256 x 64, fc2 64 x 128: 8,192 + 4,096 + 16,384 + 8,192 = 36,864 weights.
TINY = Layout(
    layers=2, hidden=64, ffn=128, heads=4, groups=2, head_dim=16, vocab_size=256, sequence=128, micro_batch=2,
    experts=0, topk=1, gated=True, tied=True, tp=1, pp=1, vpp=1, cp=1, ep=1, world=1,
)  # fmt: skip
# A machine with 1 TFLOP/s, 1 GB/s everywhere, and launches that take no time.
ROUND = Machine("round", 2e12, 1e12, 1e9, 1e9)
NO_LAUNCH = replace(MACHINES["910B"], launch_us=0.0)


def tiny(micro_batches: int = 4, tp: int = 1, pp: int = 1, dp: int = 1, **changes):
    layout = replace(TINY, tp=tp, pp=pp, world=tp * pp * dp)
    options = {"group_size": 32, "sequence_parallel": False, "distributed_optimizer": False, **changes}
    return Workload("tiny", layout, micro_batches, **options)


def test_a_step_worked_out_by_hand() -> None:
    found = cost_model.predict(ROUND, tiny())
    # 73,728 weights x 6 x 256 tokens = 113,246,208 FLOP per micro-batch, 4 micro-batches, 1e12 FLOP/s.
    assert found.gemm_seconds == pytest.approx(452.984832e-6)
    # Attention, half of a square: 6 x 256 x 128 x 64 x 2 layers = 25,165,824; output layer, the same: 6 x 256 x 256 x
    # 64.
    assert found.compute_seconds == pytest.approx(4 * 163.577856e-6)
    # Parameters: 73,728 + embedding 256 x 64 = 16,384 + norms 5 x 64 = 320: 90,432, each 38 bytes at 1 GB/s.
    assert found.optimizer_seconds == pytest.approx(3436.416e-6)
    # 73,728 x 4 bytes + 2,304 scales x 2 bytes = 299,520 bytes at 1 GB/s.
    assert found.quantizer_seconds == pytest.approx(299.52e-6)
    assert found.quantizer_step_seconds == found.quantizer_seconds and found.communication_seconds == 0
    assert found.of_gemms == pytest.approx(0.661214, rel=1e-5)  # 299.52 / 452.984832
    # 299.52 / (654.311424 + 3436.416) = 299.52 / 4090.727424
    assert found.overhead == pytest.approx(0.0732193, rel=1e-5)
    assert found.ternary_seconds == pytest.approx(4390.247424e-6)


def test_model_flops_are_megatrons() -> None:
    # flops_per_token: 6 x (2 x (36,864 + 64 x 128) + 64 x 256) = 638,976; 256 tokens, 4 times.
    assert cost_model.predict(ROUND, tiny()).model_flops == 4 * 256 * 638_976
    # Each of four ranks has a quarter. Recomputation, scores beyond the diagonal and the padding of a vocabulary (here
    # of 200) are not counted: 6 x (2 x 45,056 + 64 x 200) = 617,472.
    shared = tiny(tp=2, pp=2, recompute="full", fused_kernels=False)
    assert cost_model.predict(ROUND, shared).model_flops == 256 * 638_976
    padded = replace(tiny(), layout=replace(TINY, vocab_size=200))
    assert cost_model.predict(ROUND, padded).model_flops == 4 * 256 * 617_472


def test_kernels_that_are_not_fused_compute_scores_beyond_the_diagonal() -> None:
    # This is another 25,165,824 FLOP.
    whole = cost_model.predict(ROUND, tiny(fused_kernels=False))
    assert whole.compute_seconds == pytest.approx(4 * 188.74368e-6)


def test_memory_worked_out_by_hand() -> None:
    found = cost_model.predict(ROUND, tiny())
    memory = found.memory
    # 90,432 parameters: bf16, fp32 gradients, fp32 master weights and two moments.
    assert (memory.weights, memory.gradients, memory.optimizer) == (180_864, 361_728, 1_085_184)
    # 2 bytes per quantized weight, 2 per scale: 147,456 + 4,608.
    assert found.extra_bytes == 152_064 and found.scale_bytes == 4_608
    assert cost_model.predict(ROUND, tiny(tp=2)).extra_bytes == 76_032
    # Without the cache, every micro-batch in flight keeps its own copy: two on the first of two stages of one layer.
    staged = tiny(pp=2, cache="none")
    assert cost_model.predict(ROUND, staged).extra_bytes == 2 * 73_728 + 2_304
    assert cost_model.predict(ROUND, replace(staged, micro_batches=1)).extra_bytes == 73_728 + 2_304
    # With recomputation, there is one layer's copy at a time.
    assert cost_model.predict(ROUND, tiny(cache="none", recompute="full")).extra_bytes == 73_728 + 4_608


def test_scales_per_row() -> None:
    # There is one scale per row: 128 + 64 + 256 + 64 = 512 per layer. At TP 2, the rows of column-parallel weights are
    # divided, 64 + 128; the rows of proj and fc2 are cut, with one scale on each rank: 64 + 64.
    assert cost_model.predict(ROUND, tiny(group_size=-1)).scale_bytes == 2 * 2 * 512
    assert cost_model.predict(ROUND, tiny(group_size=-1, tp=2)).scale_bytes == 2 * 2 * 320


def test_what_is_handed_to_collectives() -> None:
    def handed(**changes: object) -> dict:
        return {(c.purpose, c.operation): c.bytes for c in cost_model.collectives(tiny(**changes))}

    # 256 tokens x 64 x 2 bytes = 32,768 bytes of activations; 90,432 parameters; a loss of 3 x 256 x 4 bytes.
    loss = {("loss", "all-reduce"): 4 * 3_072}
    assert handed() == {**loss, ("gradients", "all-reduce"): 361_728}
    # 4 micro-batches x (2 layers x (2 forward + 2 backward) + embedding + output layer), and 45,376 parameters.
    activations = ("tensor parallel", "all-reduce")
    assert handed(tp=2) == {**loss, activations: 40 * 32_768, ("gradients", "all-reduce"): 181_504}
    # The recomputed forward has 2 more per layer.
    assert handed(tp=2, recompute="full")[activations] == 56 * 32_768
    # There are as many scatters, and 2 + 2 + 2 gathers per layer, one for the embedding and two for the output layer.
    assert handed(tp=2, sequence_parallel=True) == {
        **loss,
        ("tensor parallel", "reduce-scatter"): 40 * 32_768,
        ("tensor parallel", "all-gather"): 60 * 32_768,
        ("gradients of norms", "all-reduce"): 5 * 64 * 4,
        ("gradients", "all-reduce"): 181_504,
    }
    assert handed(dp=2, distributed_optimizer=True) == {
        **loss,
        ("gradients", "reduce-scatter"): 361_728,
        ("parameters", "all-gather"): 180_864,
    }
    # A stage has one layer, the embedding or the output layer, and the last one has the final norm: 53,440 parameters.
    assert handed(pp=2) == {
        **loss,
        ("pipeline", "exchange"): 4 * 2 * 32_768,
        ("gradient of the tied embedding", "all-reduce"): 65_536,
        ("gradients", "all-reduce"): 213_760,
    }


@pytest.mark.parametrize(
    ("measured", "changes"),
    [
        (367_900, {}),
        (843_036, {"tp": 2}),
        (1_827_356, {"tp": 2, "sequence_parallel": True}),
        (2_351_644, {"tp": 2, "sequence_parallel": True, "recompute": "full"}),
        (549_148, {"dp": 2, "distributed_optimizer": True}),
        (416_540, {"pp": 2}),
    ],
)
def test_payloads_are_those_of_megatron_core(measured: int, changes: dict) -> None:
    # The bytes were counted in our training loop (megatron-core 0.16.1, gloo) in a step of two micro-batches, on the
    # rank with the most. It has 28 more bytes of single numbers (norms, tokens, loss), and with the distributed
    # optimizer 384 of padding.
    found = cost_model.predict(ROUND, tiny(micro_batches=2, **changes)).communication_bytes
    assert measured - found == (28 + 384 if "dp" in changes else 28)


def test_what_is_sent() -> None:
    # Over two ranks, an all-reduce sends its payload once, scatter and gather send half of it, a stage sends one of its
    # two exchanges, and a group of one rank sends nothing.
    assert cost_model.predict(ROUND, tiny()).wire_bytes == 0
    assert cost_model.predict(ROUND, tiny(tp=2)).wire_bytes == 12_288 + 40 * 32_768
    assert cost_model.predict(ROUND, tiny(dp=2, distributed_optimizer=True)).wire_bytes == 180_864 + 90_432
    pipeline = cost_model.predict(ROUND, tiny(pp=2))
    assert pipeline.wire_bytes == 4 * 32_768 + 65_536 and pipeline.communication_seconds == 196.608e-6


def test_a_pipeline_waits_for_its_first_quantizations() -> None:
    # A stage has one layer, whose quantization takes 149.76 us. With the cache, stage 1 quantizes after stage 0.
    assert cost_model.predict(ROUND, tiny(pp=2)).quantizer_step_seconds == pytest.approx(2 * 149.76e-6)
    # Without it, there are four micro-batches and one to fill the pipeline, also for compute: 5 x 94.37184 us.
    uncached = cost_model.predict(ROUND, tiny(pp=2, cache="none"))
    assert uncached.quantizer_step_seconds == pytest.approx(5 * 149.76e-6)
    assert uncached.compute_seconds == pytest.approx(471.8592e-6)


def test_recomputation_quantizes_and_computes_again() -> None:
    once = cost_model.predict(ROUND, tiny(cache="none"))
    again = cost_model.predict(ROUND, tiny(cache="none", recompute="full"))
    assert (once.quantizations, again.quantizations) == (4, 8)
    # A third of the linears' 113,246,208 FLOP and of attention's 25,165,824, four times.
    assert again.compute_seconds - once.compute_seconds == pytest.approx(4 * 46.137344e-6)
    cached = cost_model.predict(ROUND, tiny(recompute="full"))
    assert cached.quantizations == 1


def test_rates_of_a_calibrated_machine() -> None:
    calibrated = replace(ROUND, quantizer_copies=1.5, optimizer_bandwidth=2e9, launch_us=100, saved_bandwidth=1e9)
    found = cost_model.predict(calibrated, tiny())
    assert found.optimizer_seconds == pytest.approx(1718.208e-6)
    # The largest weight, fc1, has 66,560 bytes, 99.84 us at 1.5 copies, so that each of 8 takes as long as a launch.
    assert found.quantizer_seconds == pytest.approx(8 * 100e-6)
    free = cost_model.predict(replace(calibrated, launch_us=0.0), tiny())
    assert free.quantizer_seconds == pytest.approx(1.5 * 299.52e-6)
    # Bytes saved per token and layer: q, k, v and proj's input 2 (64 + 64 + 64), three tensors of the ffn 2 x 3 x 128,
    # hidden states 8 x 64: 1,664; 2 layers of 256 tokens: 851,968. Logits: 256 x (6 x 256 + 4 x 64) = 458,752.
    more = free.compute_seconds - cost_model.predict(replace(calibrated, saved_bandwidth=None), tiny()).compute_seconds
    assert more == pytest.approx(4 * 1310.72e-6)


@pytest.mark.parametrize("model", PRESETS)
def test_published_estimates(model: str) -> None:
    once = replace(preset(model, 4096, 1), group_size=128)
    # With 4 + 2/128 bytes per weight: 4.015625 x 155e12 / (6 x 4096 x 1.6e12) = 1.583 %, for any model.
    assert cost_model.predict(NO_LAUNCH, once).of_gemms == pytest.approx(0.015829, rel=1e-3)
    # Half of the peak instead of 155e12, which is 190e12, gives 1.940 %.
    assert cost_model.predict(replace(NO_LAUNCH, achieved_flops=190e12), once).of_gemms == pytest.approx(
        0.0194, rel=1e-2
    )
    # With eight micro-batches: 0.198 % with the cache, 1.583 % without it.
    eight = replace(once, micro_batches=8)
    assert cost_model.predict(NO_LAUNCH, eight).of_gemms == pytest.approx(0.0019786, rel=1e-3)
    assert cost_model.predict(NO_LAUNCH, replace(eight, cache="none")).of_gemms == pytest.approx(0.015829, rel=1e-3)
    # The residual form has 68.015625 bytes, 26.8 %; the torch fallback 70.015625, 27.6 %.
    assert cost_model.predict(NO_LAUNCH, replace(once, quantizer="residual")).of_gemms == pytest.approx(
        0.2681, rel=1e-3
    )
    assert cost_model.predict(NO_LAUNCH, replace(once, quantizer="torch")).of_gemms == pytest.approx(0.27599, rel=1e-3)
    # H100: 4.015625 x 405.49e12 / (6 x 4096 x 3.35e12) = 1.978 %.
    h100 = replace(MACHINES["H100"], launch_us=0.0)
    assert cost_model.predict(h100, once).of_gemms == pytest.approx(0.019778, rel=1e-3)
    # Relative to the whole step, it is less, but not much less.
    assert 0.3 < cost_model.predict(NO_LAUNCH, once).overhead / 0.015829 < 1


def test_launches_show_in_the_smallest_model() -> None:
    # In each of 24 layers, with groups of 128: qkv 1280 x 1024 and proj 1024 x 1024 end before the next launch, 10 us;
    # fc1 takes 8192 x 1024 x 4.015625 bytes at 1.6 TB/s, 21.05 us, fc2 10.53 us: 51.58 us per layer instead of 37.5 us.
    workload = replace(preset("minicpm4-0.5b", 4096, 1), group_size=128)
    found = cost_model.predict(MACHINES["910B"], workload)
    assert found.quantizer_seconds == pytest.approx(24 * 51.58e-6, rel=1e-3)


sizes = st.builds(
    lambda model, tokens, n, tp, pp: preset(model, tokens * 128, n, tp=tp, pp=pp, sequence=128),
    st.sampled_from(PRESETS), st.integers(1, 64), st.integers(1, 64),
    st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
machines = st.sampled_from(list(MACHINES.values()))


@settings(max_examples=25, deadline=None)
@given(machine=machines, workload=sizes)
def test_overhead_falls_with_tokens_and_micro_batches(machine, workload) -> None:
    found = cost_model.predict(machine, workload)
    more_tokens = replace(workload, layout=replace(workload.layout, micro_batch=2 * workload.layout.micro_batch))
    assert cost_model.predict(machine, more_tokens).overhead < found.overhead
    assert (
        cost_model.predict(machine, replace(workload, micro_batches=workload.micro_batches + 1)).overhead
        < found.overhead
    )
    assert found.ternary_seconds > found.bf16_seconds


@settings(max_examples=25, deadline=None)
@given(machine=machines, workload=sizes)
def test_the_cache_is_never_slower(machine, workload) -> None:
    cached, uncached = (
        cost_model.predict(machine, workload),
        cost_model.predict(machine, replace(workload, cache="none")),
    )
    assert cached.ternary_seconds <= uncached.ternary_seconds * (1 + 1e-12)
    assert cached.bf16_seconds == uncached.bf16_seconds
    assert cached.extra_bytes <= uncached.extra_bytes
    assert cached.communication_bytes == uncached.communication_bytes


@settings(max_examples=25, deadline=None)
@given(machine=machines, workload=sizes)
def test_tensor_parallelism_leaves_the_quantizers_share(machine, workload) -> None:
    free, workload = replace(machine, launch_us=0.0), replace(workload, group_size=128)
    shares = [
        cost_model.predict(free, replace(workload, layout=replace(workload.layout, tp=tp, world=8))).of_gemms
        for tp in (1, 2)
    ]
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)


def write(path: Path, *rows: dict, without: str = "") -> Path:
    """Writes a throughput file of the tiny model; values that a row does not have are empty."""
    shape = {
        "layout": "TP1", "tp": 1, "pp": 1, "dp": 1, "device": "cpu", "model": "0.5b-layers", "num_layers": 2,
        "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "vocab_size": 256, "seq_length": 128, "micro_batch_size": 2, "tokens": 256, "micro_batches": 4,
        "recompute": "none", "pairs": 9,
    }  # fmt: skip
    columns = [c for c in (*validation.COLUMNS, "backend", "pairs") if c != without]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**shape, **row} for row in rows)
    return path


def machine_for_tests(workload, device: str):
    assert device == "cpu"
    return ROUND


BF16 = {"variant": "bf16", "step_ms": 5.0, "ratio": 1.0, "peak_bytes": 1_000_000, "resident_bytes": 500_000}
TERNARY = {
    "variant": "step", "step_ms": 6.0, "ratio": 1.1, "ratio_low": 1.05, "ratio_high": 1.25, "peak_bytes": 1_200_000,
    "resident_bytes": 650_000, "quantized_weights": 73_728, "quantizations": 8, "collective_bytes": 374_000,
}  # fmt: skip


def test_predicted_next_to_measured(tmp_path: Path) -> None:
    peer = {"variant": "torchao", "step_ms": 9.0}
    path = write(tmp_path / "t.csv", BF16, TERNARY, peer, {**TERNARY, "variant": "none", "ratio": ""})
    (bf16, ternary, uncached), notes, machines = validation.validate(path, machine_for_tests)
    assert len(machines) == 1
    # Our loop has no fused kernels, so that attention is a whole square; there is one scale per row: 4 x 512 bytes.
    assert bf16.step_ms == pytest.approx(4.19139072) and bf16.measured["step_ms"] == 5.0
    # 294,912 + 2,048 bytes at 1 GB/s.
    assert ternary.step_ms == pytest.approx(4.19139072 + 0.29696)
    assert ternary.prediction.overhead == pytest.approx(0.0708500, rel=1e-5)
    measured = ternary.measured
    assert (measured["ratio"], measured["ratio_low"], measured["ratio_high"]) == (1.1, 1.05, 1.25)
    assert ternary.prediction.extra_bytes == 147_456 + 2_048
    assert (measured["more_peak_bytes"], measured["more_resident_bytes"]) == (200_000, 150_000)
    # These are the bytes of the loss and the gradients, in groups of one rank.
    assert (ternary.prediction.communication_bytes, measured["collective_bytes"]) == (374_016, 374_000)
    # If there is no ratio, the ratio of the step times is used.
    assert uncached.prediction.overhead == pytest.approx(0.2834, rel=1e-4)
    assert uncached.measured["ratio"] == pytest.approx(1.2)
    assert "torchao" in notes[0]
    # The file's 8 quantizations are 2 layers x 4 weights, once; without the cache, there should be four times as many.
    assert notes[1:] == ["TP1, T=256, n=4, none: 8 quantizations, the model has 32."]


def test_another_backend_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", BF16, {**TERNARY, "backend": "other"})
    _, (note,), _ = validation.validate(path, machine_for_tests)
    assert "measured with the backend other, predicted with " in note


def test_too_few_pairs_have_no_interval(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", BF16, {**TERNARY, "ratio_low": "-inf", "ratio_high": "inf"})
    (_, ternary), _, _ = validation.validate(path, machine_for_tests)
    assert ternary.measured["ratio_low"] is None and "..." not in validation.validation_table([ternary])


def test_layouts_and_variants_are_understood(tmp_path: Path) -> None:
    rows = [
        {**BF16, "layout": "TP2+SP", "tp": 2},
        {**BF16, "layout": "DP2+DO", "dp": 2},
        {**BF16, "layout": "DP2", "dp": 2, "recompute": "full", "model": "minicpm4-8b"},
    ]
    plain = [validation.workload_of(row) for row in validation.read_rows(write(tmp_path / "t.csv", *rows))]
    assert [(w.sequence_parallel, w.distributed_optimizer, w.recompute, w.layout.tied) for w in plain] == [
        (True, False, None, True),
        (False, True, None, True),
        (False, False, "full", False),
    ]
    rows = [{**TERNARY, "variant": variant} for variant in ("bf16", "ternary", "none", "step", "resident")]
    caches = [validation.workload_of(row).cache for row in validation.read_rows(write(tmp_path / "t.csv", *rows))]
    assert caches == ["step", "resident", "none", "step", "resident"]


def test_a_published_machine_stands_in_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {**BF16, "device": "NVIDIA H100 80GB HBM3"})
    _, _, (machine,) = validation.validate(path, machine_for_tests)
    assert machine == MACHINES["H100"]


def test_validation_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "t.csv", BF16, TERNARY)
    assert roofline.main(["--validate", str(path)], machine_for_tests) == 0
    printed = capsys.readouterr().out
    assert "| 0.5b-layers | TP1 | cpu | 256 | 4 | bf16 | 4.2 / 5.0 | - | - | 0.37 / - |" in printed
    assert "| step | 4.5 / 6.0 | 7.0" in printed
    assert " / 10.00 (5.00 ... 25.00) | 0.15 / 0.20 / 0.15 | 0.37 / 0.37 |" in printed
    assert "- round: 1 TFLOP/s" in printed


@pytest.mark.parametrize(
    ("row", "without", "said"),
    [
        ({}, "ratio", "no column ratio"),
        ({"tokens": 100}, "", "tokens 100 are not seq_length x micro_batch_size"),
        ({"tp": "two"}, "", "tp is 'two', not a number"),
        ({"step_ms": "nan"}, "", "step_ms is 'nan'"),
        ({"hidden_size": ""}, "", "nothing in hidden_size"),
        ({"hidden_size": 0}, "", "hidden has to be positive"),
        ({"recompute": "some"}, "", "recompute 'some' is none of"),
        ({"model": "unknown"}, "", "model 'unknown' is neither a preset nor 0.5b-layers"),
        ({"device": "TPU v9"}, "", "device 'TPU v9' is neither here nor one of 910B"),
    ],
)
def test_a_bad_file_is_refused(
    tmp_path: Path, row: dict, without: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "t.csv", {**BF16, **row}, without=without)
    assert roofline.main(["--validate", str(path)], machine_for_tests) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert roofline.main(["--validate", str(tmp_path / "no.csv")], machine_for_tests) == 2
    assert "no.csv" in capsys.readouterr().err
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    assert roofline.main(["--validate", str(tmp_path / "binary.csv")], machine_for_tests) == 2
    assert roofline.main(["--validate", str(write(tmp_path / "empty.csv"))], machine_for_tests) == 2
    assert "no rows" in capsys.readouterr().err
    torn = write(tmp_path / "torn.csv", BF16)
    torn.write_text(torn.read_text(encoding="utf-8").rstrip() + "\nTP1,1\n", encoding="utf-8")
    assert roofline.main(["--validate", str(torn)], machine_for_tests) == 2
    assert "torn.csv, row 2" in capsys.readouterr().err


def test_tokens_that_are_no_whole_sequences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert roofline.main(["--tokens", "5000", "--output-dir", str(tmp_path / "out")], machine_for_tests) == 2
    assert "no whole number of sequences" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_accelerator_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that names a GPU is calibrated on that GPU, whose name comes from torch's module of the device."""
    gpu = SimpleNamespace(is_available=lambda: True, get_device_name=lambda index: f"GPU {index}")
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    asked = []
    validation._machine_of("GPU 0", None, lambda workload, device: asked.append(device))
    assert asked == ["cuda"]


@pytest.mark.slow
def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chosen = ["minicpm4-0.5b", "minicpm4-8b"]
    assert roofline.main(["--models", *chosen, "--output-dir", str(tmp_path)], machine_for_tests) == 0
    with open(tmp_path / "roofline.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * 2
    assert {(r["model"], r["machine"]) for r in rows} == {
        (model, machine) for model in chosen for machine in ("910B", "H100", "round")
    }
    assert all(0 < float(r["overhead_percent"]) <= float(r["once_per_micro_batch_percent"]) for r in rows)
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.count("| minicpm4-0.5b |") == 12 and "Predicted, not measured" in printed


def test_a_calibration_measures_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_RING_BYTES", 2**20)
    monkeypatch.setattr(calibration, "_ELEMENTS_LIMIT", 2**16)
    threads = torch.get_num_threads()
    machine = calibration.calibrate(tiny(tp=2, fused_kernels=False, group_size=-1))
    rates = (machine.achieved_flops, machine.memory_bandwidth, machine.optimizer_bandwidth, machine.saved_bandwidth)
    assert min(*rates, machine.link_bandwidth) > 1e5
    assert machine.quantizer_copies > 0.05 and 0 < machine.launch_us < 1e6
    assert torch.get_num_threads() == threads


def test_layouts_that_the_model_cannot_be_cut_into() -> None:
    with pytest.raises(BadInput, match="TP 7 does not divide 2 query groups: use one of 1, 2"):
        preset("minicpm4-0.5b", 4096, 1, tp=7)
    with pytest.raises(BadInput, match="24 layers do not make up 25 pipeline stages"):
        preset("minicpm4-0.5b", 4096, 1, pp=25)
