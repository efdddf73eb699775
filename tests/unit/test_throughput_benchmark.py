# SPDX-License-Identifier: Apache-2.0
"""Tests of the throughput benchmark: its statistics, meters, plans and tables, and one short job that is really run."""

import csv
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CHECKOUT = Path(__file__).parents[2]

import throughput
import throughput_job
from cost.workload import flops_per_token, layout_of
from report.intervals import median_interval
from steps import host_jobs, meters, plan, processes
from steps import report as throughput_report
from steps.layouts import Layout
from steps.variants import PEERS

from bitcpm_megatron.nn.cache import CacheEpoch
from bitcpm_megatron.nn.linear import TernaryState
from bitcpm_megatron.ops import active_backend, quantize_in_place
from bitcpm_megatron.quantization import QuantizerConfig

# ------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_of_a_median_is_the_tabulated_one() -> None:
    """The ranks equal the binomial table: 6 -> 1 and 6, 10 -> 2 and 9, 30 -> 10 and 21, 40 -> 14 and 27."""
    for n, low, high in ((6, 1, 6), (10, 2, 9), (30, 10, 21), (40, 14, 27)):
        values = list(range(1, n + 1))
        random.Random(n).shuffle(values)
        assert median_interval(values) == ((n + 1) / 2, low, high)
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, -float("inf"), float("inf"))
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    g = random.Random(1)
    inside = 0
    for _ in range(2000):
        _, low, high = median_interval([g.expovariate(1.0) for _ in range(30)])
        inside += low <= 0.6931 <= high
    assert 0.94 <= inside / 2000 <= 0.98


# ----------------------------------------------------------------------------------------------------------- meters


def test_memory_sees_the_peak_and_what_stays() -> None:
    with meters.memory(torch.device("cpu")) as found:
        kept = torch.ones(4 << 20)
        passing = kept + kept
        del passing
    assert found.peak == pytest.approx(2 * kept.nbytes, rel=0.02)
    assert found.resident == pytest.approx(kept.nbytes, rel=0.02)


def test_collectives_are_counted_by_their_payload(single_rank: None) -> None:
    x, whole = torch.ones(8), torch.ones(32)
    with meters.CollectiveBytes() as found:
        torch.distributed.all_reduce(x)
        torch.distributed.broadcast(whole, 0)
        torch.distributed.all_gather([torch.ones(8)], x)
        torch.distributed.barrier()
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
    assert dict(found.by_operation) == {"allreduce_": 32, "broadcast_": 128, "allgather_": 32}
    assert found.total == 192


def test_the_work_of_the_quantizer_is_counted() -> None:
    state = TernaryState("layer", QuantizerConfig(), CacheEpoch())
    weights = [torch.randn(4, 32), torch.randn(8, 64)]
    scales = [torch.empty(weight.shape[0], 1, dtype=torch.bfloat16) for weight in weights]
    with meters.quantizer_work() as found:
        state.weight(weights[1], True)
        quantize_in_place(weights, QuantizerConfig())
    together = active_backend("cpu").backend.together(weights, weights, scales, [-1, -1], QuantizerConfig())
    assert (found.launches, found.elements) == (1 + together, 4 * 32 + 2 * 8 * 64)
    state.weight(weights[1], True)
    assert found.launches == 1 + together


@pytest.mark.parametrize("cache, expected", [("step", 1), ("none", 3)])
def test_live_copies_are_counted(cache: str, expected: int) -> None:
    """Three micro-batches are in flight, then their backward passes run; this is done twice."""
    epoch = CacheEpoch()
    state = TernaryState("layer", QuantizerConfig(), epoch, cache)
    latent = torch.randn(32, 64, requires_grad=True)
    with meters.live_copies() as copies:
        for _ in range(2):
            epoch.start()
            epoch.begin()
            losses = []
            for _ in range(3):
                weight = state.weight(latent, True).detach().requires_grad_()
                losses.append((torch.ones(4, 64, requires_grad=True) @ weight.t()).sum())
            while losses:
                losses.pop().backward()
            epoch.end()
    assert copies.most == expected
    assert TernaryState.weight.__qualname__ == "TernaryState.weight"


# ------------------------------------------------------------------------------------------------- plans and layouts


@pytest.mark.parametrize("text", ["TP1", "TP2", "TP2xPP2", "PP4", "DP2+DO", "TP2xDP3+SP+DO", "CP2", "TP2xPP2xCP4xDP2"])
def test_layouts_are_read_as_they_are_written(text: str) -> None:
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["TP", "TP0", "2", "TP2PP2", "TP2+FOO", "TP2xTP2", "CP0"])
def test_other_layouts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        Layout.parse(text)


def test_the_standard_comparison_is_what_is_promised() -> None:
    jobs = plan.standard(PEERS)
    for layout in ("TP1", "TP2"):
        sessions = next(job.sessions for job in jobs if str(job.layout) == layout)
        assert {s.micro_batches: s.rounds >= 30 for s in sessions} == {8: True, 1: True}
        assert all(s.variants == ("bf16", "none", "step", "resident") for s in sessions)
    shared = next(job for job in jobs if job.layout.data > 1)
    assert {"step", "resident", "packed-gather"} <= set(shared.costs) and shared.layout.distributed_optimizer
    assert all(job.seq_length == 256 for job in jobs[:3])
    beside_peers = next(job.sessions for job in jobs if any(set(PEERS) <= set(s.variants) for s in job.sessions))
    assert {s.micro_batches for s in beside_peers} == {1, 8}


def test_what_shapes_a_run_is_never_ignored() -> None:
    """An argument that changes what is run replaces the standard comparison."""
    asked = throughput._parser().parse_args(["--recompute", "full", "--vocab-size", "4096"])
    (job,) = throughput.jobs_of(asked)
    assert job.recompute == "full" and job.flags[job.flags.index("--vocab-size") + 1] == "4096"
    assert len(throughput.jobs_of(throughput._parser().parse_args([]))) == len(plan.standard(PEERS))
    shared = ["--variants", "bf16", "step", "--context-parallel-size", "2", "--layouts"]
    layouts = [job.layout for job in throughput.jobs_of(throughput._parser().parse_args([*shared, "TP1", "CP2"]))]
    assert list(map(str, layouts)) == ["CP2", "CP2"]
    with pytest.raises(ValueError, match="--layouts CP4 and --context-parallel-size 2"):
        throughput.jobs_of(throughput._parser().parse_args([*shared, "CP4"]))


def test_every_variant_has_its_flags_told_before_anything_starts(capsys: pytest.CaptureFixture) -> None:
    job = replace(plan.standard(())[0], ternary=("--ternary-group-size", "64"))
    assert job.variants == ("bf16", "none", "step", "resident")
    assert job.flags_of("bf16") == [] and job.flags_of("compiled") == []
    assert job.flags_of("none") == "--ternary --ternary-cache none --ternary-group-size 64".split()
    with pytest.raises(SystemExit):
        throughput.main(["--layouts", "DP2", "--variants", "bf16", "packed-gather"])
    assert "needs --use-distributed-optimizer" in capsys.readouterr().err


def test_the_order_of_steps_is_balanced() -> None:
    for count in (2, 4, 8):
        rounds = [throughput_job.order(count, turn) for turn in range(count)]
        assert all(sorted(places) == list(range(count)) for places in (*rounds, *zip(*rounds, strict=True)))
        follows = [pair for r in rounds for pair in zip(r, r[1:], strict=False)]
        assert len(set(follows)) == len(follows) == count * (count - 1)
    assert sorted(throughput_job.order(5, 3)) == list(range(5))


def test_peers_go_without_gradient_accumulation_fusion() -> None:
    flags = plan.model_flags("0.5b-layers", None, None)
    for variants, expected in ((("bf16", "ternary"), False), (("bf16", "compiled"), True)):
        job = plan.Job("m", flags, Layout(), 32, 1, "none", (plan.Session(variants, 1, 1),), ())
        assert ("--no-gradient-accumulation-fusion" in job.arguments()) == expected


def test_presets_keep_all_their_flags() -> None:
    line = plan.model_flags("minicpm4-0.5b", 3, None)
    assert line[line.index("--num-layers") + 1] == "3" and line[line.index("--vocab-size") + 1] == "73448"
    factors = line[line.index("--rope-scaling-short-factor") + 1 : line.index("--rope-scaling-long-factor")]
    assert len(factors) == 32
    assert "--swiglu" in line and "True" not in line


def test_bad_requests_are_refused(capsys: pytest.CaptureFixture) -> None:
    for argv, why in (
        (["--variants", "ternary"], "name bf16 too"),
        (["--layouts", "TP2xFOO"], "layout"),
        (["--peers", "--variants", "bf16"], "leave --variants out"),
        (["--variants", "bf16", "torchao-linear", "--layouts", "TP2"], "torchao-linear at TP2"),
        (["--host", "megatron-lm"], "--megatron-path"),
        (["--host", "megatron-lm", "--megatron-path", "x", "--peers"], "leave --peers"),
        (["--host", "megatron-lm", "--megatron-path", "x", "--vocab-size", "2048"], "more than 4096"),
        (["--host", "megatron-lm", "--megatron-path", "/nowhere"], "--megatron-path /nowhere: holds no directory"),
        (["--layouts", "DP99999"], "needs 99999 processes"),
    ):
        assert throughput.main(argv) == 2
        assert why in capsys.readouterr().err


def test_what_no_rank_could_run_is_refused_before_any_starts(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(throughput.processes, "run", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit) as leaving:
        throughput.main(["--layouts", "TP3", "--model", "0.5b-layers"])
    assert leaving.value.code == 2 and "does not divide" in capsys.readouterr().err


def test_an_npu_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    assert throughput.main([]) == 2
    assert "--host megatron-lm" in capsys.readouterr().err


def test_the_flops_are_megatrons() -> None:
    """For a token of Llama-2-7B at s = 4,096, a layer has 4 h^2 + h s + 3 h f multiply-adds, the logits 32000 h.

    h is the hidden size, s the sequence length, f the ffn size.
    """
    row = _row("bf16", num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)
    row.num_query_groups, row.kv_channels, row.vocab_size, row.seq_length = 32, 128, 32000, 4096
    per_layer = 67_108_864 + 16_777_216 + 135_266_304
    assert flops_per_token(layout_of(vars(row), tied=True)) == 6 * (32 * per_layer + 131_072_000)


def _row(variant: str, **changes) -> throughput_report.Row:
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    numbers = {"num_query_groups": 2, "kv_channels": 16, "vocab_size": 128, "seq_length": 32, "micro_batch_size": 1}
    layout = {"layout": "TP2", "tp": 2, "pp": 1, "cp": 1, "dp": 1, "packed": False, "device": "cpu", "model": "tiny"}
    rest = {"tokens": 32, "micro_batches": 8, "recompute": "none", "variant": variant, "backend": "", "pairs": 6}
    return throughput_report.Row(**{**layout, **shape, **numbers, **rest, **changes})


# ---------------------------------------------------------------------------------------------------------- host jobs


def test_host_commands_differ_in_the_ternary_flags_alone() -> None:
    args = throughput._parser().parse_args(
        ["--host", "megatron-lm", "--megatron-path", "M", "--host-flags=--use-flash-attn"]
    )
    flags = plan.model_flags("0.5b-layers", None, None)
    session = plan.Session(("bf16", "ternary"), 8, 2)
    ternary_flags = plan.ternary_flags(args)
    job = plan.Job("0.5b-layers", flags, Layout(tensor=2, data=2), 256, 2, "full", (session,), (), ternary_flags)
    bf16, ternary = (host_jobs.command(args, job, name, accelerator=False) for name in session.variants)
    ours = "--ternary --ternary-group-size -1 --ternary-backend auto".split()
    at = ternary.index("--ternary")
    assert ternary[at : at + 5] == ours and ternary[:at] + ternary[at + 5 :] == bf16
    assert bf16[bf16.index("--global-batch-size") + 1] == "32" and "--use-flash-attn" in bf16
    assert bf16[bf16.index("--nproc_per_node") + 1] == "4" and "--recompute-granularity" in bf16


@pytest.mark.slow
def test_a_host_job_that_fails_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "megatron").mkdir()
    argv = ["--host", "megatron-lm", "--megatron-path", str(tmp_path), "--pairs", "1", "--micro-batches", "1"]
    assert throughput.main(argv) == 1
    error = capsys.readouterr().err
    assert "--script pretrain_gpt.py: not found" in error and "Traceback" not in error


# ------------------------------------------------------------------------------------------------------------- a job


@pytest.mark.slow
def test_a_job_is_heard_while_it_runs(tmp_path: Path) -> None:
    script, answer = tmp_path / "job.py", tmp_path / "answer"
    script.write_text(f"""
import pathlib, sys, time
print("a step", flush=True)
for _ in range(600):
    if pathlib.Path({str(answer)!r}).exists():
        print("heard", file=sys.stderr)
        sys.exit(0)
    time.sleep(0.1)
sys.exit(1)
""")
    done = processes.run(1, script, [], {}, lambda line: answer.touch() if line == "a step\n" else None)
    assert done.returncode == 0, done.stdout
    assert "a step" in done.stdout and "heard" in done.stdout


@pytest.mark.slow
def test_a_short_job_measures_everything(tmp_path: Path) -> None:
    """The job runs at TP2 with every variant; numbers that do not depend on time are exact."""
    flags = """
        --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --swiglu --normalization RMSNorm
        --disable-bias-linear --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --vocab-size 128
    """.split()
    names = ("bf16", "none", "step", "resident", "int8-backward", "bitcpm-residual")
    session = plan.Session(names, 3, 6)
    ternary_flags = tuple("--ternary-group-size -1 --ternary-backend auto".split())
    job = plan.Job("tiny", tuple(flags), Layout(tensor=2), 32, 1, "none", (session,), names[:5], ternary_flags)
    told: list[int] = []
    results = throughput.run(job, told.append)
    assert set(told) == {2, 3} and sum(told) == job.micro_batches  # 2: the steps whose memory is measured
    rows = {row.variant: row for row in throughput_report.rows_of(job, results)}
    assert list(rows) == list(names)

    local = (3 * 64 * 64 + 64 * 64 + 3 * 64 * 128) // 2 * 2  # qkv, proj, fc1, fc2 of two layers on one of two ranks
    ours, cached, uncached = rows["resident"], rows["step"], rows["none"]
    assert ours.quantized_weights == cached.quantized_weights == uncached.quantized_weights == local
    assert (ours.quantizations, cached.quantizations, uncached.quantizations) == (8, 8, 24)
    assert (ours.launches, cached.launches, uncached.launches) == (1, 1, 24)
    assert (ours.live_copies, cached.live_copies, uncached.live_copies) == (0, 1, 1)
    assert ours.gathered_per_weight is None
    # The graph of this variant must not be watched, and only this one has int8 GEMMs to measure.
    integers = rows["int8-backward"]
    assert integers.live_copies is None and integers.peak_bytes > 0 and integers.quantizations == 8
    assert [row.variant for row in rows.values() if row.int8_gemm_ms is not None] == ["int8-backward"]
    assert len({row.collective_bytes for row in rows.values()}) == 1
    # The forward of a micro-batch reduces the embedding and two outputs per layer, and the backward two inputs per
    # layer and that of the output layer. Then the losses of tokens, the gradients in fp32 (the vocabulary is padded to
    # 256) and some scalars are reduced.
    activations = 3 * (1 + 2 * 2 + 2 * 2 + 1) * 32 * 64 * 2
    gradients = 4 * (local + 256 // 2 * 64 + 5 * 64)
    assert 0 <= ours.collective_bytes - activations - gradients < 2048
    assert 0 < cached.peak_bytes - rows["bf16"].peak_bytes < 4 * local * 2
    # In so small a model, temporary memory of gloo is larger than the copy; test_memory_benchmark.py has a larger
    # model.
    assert ours.peak_ratio == ours.peak_bytes / rows["bf16"].peak_bytes
    assert ours.of_step > 0 and cached.of_step is None and rows["bf16"].of_step is None
    assert all(row.step_ms > 0 and row.ratio > 0 for row in rows.values() if row.variant != "bf16")

    throughput_report.write(list(rows.values()), tmp_path, "throughput", "the command")
    with open(tmp_path / "throughput.csv", newline="") as file:
        written = {line["variant"]: line for line in csv.DictReader(file)}
    assert float(written["resident"]["ratio"]) == pytest.approx(ours.ratio, rel=1e-5)
    text = (tmp_path / "throughput.md").read_text()
    assert f"{ours.ratio:.3f}" in text and "`the command`" in text and "bitcpm-residual" in text
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_the_last_line_has_a_time_and_a_peak() -> None:
    time = _row("resident", ratio=1.0036, peak_ratio=1.2)
    peak = _row("resident", layout="TP1", micro_batches=1, peak_ratio=1.0004)
    others = [_row("step", ratio=2.0, peak_ratio=2.0), _row("resident", layout="TP1", recompute="full", peak_ratio=3.0)]
    expected = "bench: ternary/bf16 step time 1.004 (8 micro-batches, TP2), peak memory 1.000 (resident, TP1)"
    assert throughput_report.last_line([*others, time, peak]) == expected
    int8 = [_row("int8", layout="TP1", tokens=tokens, ratio=tokens / 1000) for tokens in (256, 1024)]
    assert throughput_report.last_line([time, peak, *int8]) == expected + ", int8 1.024 (8 x 1,024 tokens, TP1)"
    assert throughput_report.last_line([*others, time]) is None and throughput_report.last_line([*others, peak]) is None


def test_what_is_gathered_is_told_per_quantized_weight() -> None:
    """The number is 2 bytes of a bf16 weight minus the reduction of collective bytes relative to BF16."""
    session = plan.Session(("bf16", "step", "packed-gather"), 1, 1)
    flags = (*plan.model_flags("0.5b-layers", None, None), "--make-vocab-size-divisible-by", "1")
    job = plan.Job("m", flags, Layout(data=2, distributed_optimizer=True), 32, 1, "none", (session,), session.variants)
    counted = {"bf16": {"collective_bytes": 10_000}}
    counted |= {
        name: {"collective_bytes": n, "launches": 1} for name, n in (("step", 10_000), ("packed-gather", 8_270))
    }
    results = {
        "sessions": [{**vars(session), "seconds": [[2.0], [3.0], [4.0]], "counted": counted}],
        "costs": {name: {"peak_bytes": 100, "quantized_weights": 1000} for name in session.variants},
        **{"notes": {}, "device": "cpu", "cost_micro_batches": 2},
    }
    rows = {row.variant: row for row in throughput_report.rows_of(job, results)}
    assert rows["bf16"].gathered_per_weight is None and rows["step"].gathered_per_weight == 2
    assert rows["packed-gather"].gathered_per_weight == pytest.approx(0.27)
    assert (rows["packed-gather"].ratio, rows["packed-gather"].of_step) == (2, pytest.approx(4 / 3))


@pytest.mark.slow
def test_a_peer_that_is_not_in_the_forward_is_found(tmp_path: Path) -> None:
    program = """
import sys
import throughput_job
from steps import variants
variants.VARIANTS["idle"] = variants.Variant("idle", (), lambda: (lambda weight: weight))
throughput_job.initialize(throughput_job.parse_args(sys.argv[1:], 1))
throughput_job.build("idle", sys.argv[1:])
"""
    line = """
        --num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
        --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --vocab-size 128 --disable-bias-linear --bf16
    """.split()
    command = [sys.executable, "-W", "ignore", "-c", program, *line]
    done = subprocess.run(command, cwd=CHECKOUT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 1 and "computes with its latent weight" in done.stderr


def test_the_committed_table_was_measured() -> None:
    """The table and its data agree; ``scripts/check_docs.py`` checks the figures in README."""
    directory = CHECKOUT / "docs" / "benchmarks"
    with open(directory / "throughput.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = [r for r in rows if (r["layout"], r["micro_batches"]) == ("TP2", "8") and r["ratio"]][-1]
    shown = f"{float(row['ratio']):.3f} ({float(row['ratio_low']):.3f} - {float(row['ratio_high']):.3f})"
    assert shown.replace(" (", "** (") in (directory / "throughput.md").read_text()
