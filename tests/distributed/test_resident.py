# SPDX-License-Identifier: Apache-2.0
"""The storage of quantized weights changes no bit: resident in parameters, cached beside them, or made in each forward.

Compared are losses, gradient norms, the optimizer's masters, the quantized weights of every rank, and checkpoints.
Three settings run by default; ``make test-resident`` runs a pairwise cover of all.
"""

import json
from pathlib import Path

import pytest
import torch
from support.resident_cases import MODEL, SETTINGS, Setting, arguments, compared
from support.small_model import succeeded

from bitcpm_megatron.files import read_digests

HERE = ["DP2 g=128 distributed", "PP2+VPP2 g=-1 fusion", "TP2xDP2 g=-1 overlaps fusion distributed"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_setting")
        settings = [setting for setting in SETTINGS if every or str(setting) in HERE]
        assert len(settings) >= len(HERE)
        metafunc.parametrize("setting", settings, ids=str)
        metafunc.parametrize("steps", [50 if every else 10])
    if "data_parallel" in metafunc.fixturenames:
        metafunc.parametrize("data_parallel", [2, 4] if metafunc.config.getoption("every_setting") else [2])


@pytest.mark.verifies(
    "training",
    "storing quantized weights in the parameters, packed in 2 bits, or in a cache, or computing them in every "
    "forward pass makes no difference: losses, master weights, quantized weights and checkpoint bytes are equal",
)
def test_every_mode_takes_the_same_steps(setting: Setting, steps: int, launch_runs, tmp_path: Path) -> None:
    half = steps // 2
    # tests/distributed/test_param_gather.py has packed weights in more layouts.
    packed = setting.distributed and (steps == 50 or setting.layout == "DP2")
    modes = ["resident", "step", "none", *(["packed"] if packed else [])]
    runs = {
        cache: arguments(setting, cache, steps, ["--save", str(tmp_path / cache), "--save-interval", str(half)])
        for cache in modes
    }
    # With this flag the run saves while training continues and the parameters are quantized again.
    runs["resident"].append("--async-save")
    # One mode resumes the checkpoint of another.
    most = "packed" if packed else "resident"
    pairs = {"resident": "step", "step": most, **({"packed": "resident"} if packed else {})}
    for mode, other in pairs.items():
        kept = str(tmp_path / f"half of {other}")
        runs[f"half of {other}"] = arguments(setting, other, steps, ["--save", kept, "--exit-interval", str(half)])
        runs[f"{mode} from {other}"] = arguments(setting, mode, steps, ["--load", kept])
    report, directory = launch_runs(runs, setting.ranks, digests=steps // 10)
    succeeded(report, *runs)
    cuts = compared(directory, tuple(modes), setting.ranks)
    # Parameters begin at multiples of 64 elements, so that the edges of shards cut rows but no groups of 64.
    assert cuts > 0 or setting.group != -1 or not setting.distributed or "DP2" not in setting.layout
    for rank in range(setting.ranks):
        whole = json.loads((directory / f"step.digests.rank{rank}.json").read_text())["steps"]
        for name in (f"{mode} from {other}" for mode, other in pairs.items()):
            assert json.loads((directory / f"{name}.digests.rank{rank}.json").read_text())["steps"] == whole[half:]
    for iteration in (f"iter_{half:07}", f"iter_{steps:07}"):
        step = read_digests(tmp_path / "step" / iteration)
        shards = [name for name in step if name.endswith(".distcp")]
        for mode in modes:
            found = read_digests(tmp_path / mode / iteration)
            assert shards and {n: found[n] for n in shards} == {n: step[n] for n in shards}, mode


def test_int8_gemms_see_the_same_weights_in_every_mode(launch_runs, shared_ranks, tmp_path: Path) -> None:
    setting = Setting("DP2", overlaps=True, group=-1, fusion=True, distributed=True)
    int8 = ["--ternary-activation-bits", "8", "--ternary-gemm", "int8", "--ternary-gemm-backward", "int8"]
    modes = ("resident", "step", "none", "packed")
    runs = {cache: [*arguments(setting, cache, 6, []), *int8] for cache in modes}
    shared = Setting("TP2", overlaps=False, group=-1, fusion=True, distributed=True)
    runs["shared"] = [*arguments(shared, "auto", 1, ["--save", str(tmp_path / "saved")]), *int8]
    report, directory = launch_runs(runs, setting.ranks, digests=1)
    succeeded(report, *runs)
    compared(directory, modes, setting.ranks)
    # On one rank every weight has two row-parallel shards, and fp32 has no int8 GEMM, but the model can still be used.
    cases = {"alone": {"load": str(tmp_path / "saved"), "tokens": [[1, 2, 3]], "legacy": False}}
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits" / "cases.json").write_text(json.dumps(cases))
    shared_ranks(1).run("logits", tmp_path / "logits")
    logits = torch.load(tmp_path / "logits" / "logits.pt", weights_only=True)["alone"]
    assert logits.shape[:2] == (1, 3) and logits.isfinite().all()


# In a deep model the largest weight is a small part of all weights; only one weight is unpacked at a time.
DEEP = [*(flag for flag in MODEL if flag != "--ternary"), "--num-layers", "12", "--use-distributed-optimizer"]
SMALLEST = 2 * 256 * 256


def test_packed_weights_save_their_bf16_memory(data_parallel: int, launch_runs) -> None:
    packed = ["--ternary", "--ternary-group-size", "128", "--ternary-cache", "packed"]
    # Memory that a process allocates only once is counted in the first run.
    kinds = {"first": packed, "bf16": [], "packed": packed}
    runs = {name: [*DEEP, *flags, "--train-iters", "2"] for name, flags in kinds.items()}
    report, directory = launch_runs(runs, data_parallel, memory=True)
    succeeded(report, *runs)
    reports = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(data_parallel)]
    peaks = {name: max(found[name]["memory"]["peak"] for found in reports) for name in runs}
    weights = report["packed"]["memory"]["weights"]
    assert weights == 12 * (4 * 256 * 256 + 3 * 256 * 512)
    saved = (peaks["bf16"] - peaks["packed"]) / weights
    # The saving is 2 bytes per weight, minus codes and scales, and minus the unpacked largest weight.
    assert saved >= 1.6, (saved, peaks)
    # The largest dense tensors that remain are scales; no bf16 weight remains, not even a part.
    assert all(found["packed"]["memory"]["dense"] < SMALLEST for found in reports)


CUTS = {
    "rows": {"rows": 24, "columns": 160, "group": -1, "before": 64, "behind": 64},
    "an odd width": {"rows": 7, "columns": 333, "group": -1, "before": 0, "behind": 5},
    "groups of 64": {"rows": 9, "columns": 192, "group": 64, "before": 32, "behind": 100},
    "a row over three shards": {"rows": 1, "columns": 640, "group": -1, "before": 60, "behind": 300},
    "a row over all shards": {"rows": 1, "columns": 1024, "group": -1, "before": 0, "behind": 0},
    "nothing in some shards": {"rows": 2, "columns": 64, "group": -1, "before": 0, "behind": 2000},
    "edges between rows": {"rows": 8, "columns": 64, "group": -1, "before": 0, "behind": 0},
}


def test_groups_that_the_edges_of_shards_cut(shared_ranks, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(CUTS))
    reports = shared_ranks(4).run("cut_groups", tmp_path)
    for name in CUTS:
        of_ranks = [report[name] for report in reports]
        assert all(found["weight"] and found["scales"] for found in of_ranks), (name, of_ranks)
        whole = name in ("nothing in some shards", "edges between rows")
        assert (sum(found["cuts"] for found in of_ranks) == 0) == whole, (name, of_ranks)
    assert max(report["a row over three shards"]["most_pieces"] for report in reports) == 3
    assert all(report["a row over all shards"]["most_pieces"] == 4 for report in reports)
