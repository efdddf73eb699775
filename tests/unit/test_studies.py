# SPDX-License-Identifier: Apache-2.0
"""Tests of studies: the runs that they would start, their order, and their evaluation of losses."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import distillation_stages as stages
import int8_quality
import numpy as np
import pytest
import space_errors
import torch
import training_runs
from safetensors.torch import load_file, save_file
from support import tiny_hf
from training_runs import Run

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, qat_convert
from bitcpm_megatron.cli import FailedError
from bitcpm_megatron.files import FileError
from bitcpm_megatron.quantization import SPACES, QuantizerConfig
from bitcpm_megatron.training.flags import parse_args


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Makes a directory for runs, with files of data that satisfy the parser of arguments."""
    for part in ("train", "valid"):
        for suffix in (".idx", ".bin"):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / f"{part}_text_document{suffix}").touch()
    (tmp_path / "tokenizer.model").touch()
    return tmp_path


def arguments(run: Run) -> argparse.Namespace:
    return parse_args(run.command()[2:], 1)


def ended(run: Run, losses: Mapping[int, float], distill: tuple[float, ...] = ()) -> Run:
    """Writes what a finished run leaves, and returns the run."""
    run.directory.mkdir(parents=True)
    records = [{"kind": "valid", "iteration": step, "lm_loss": loss} for step, loss in losses.items()]
    records += [{"kind": "train", "iteration": i, "distill_loss": value} for i, value in enumerate(distill, start=1)]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.mark.parametrize("kind", int8_quality.KINDS)
def test_runs_differ_in_the_flags_that_are_compared(kind: str, work: Path) -> None:
    runs = {run.kind: arguments(run) for run in int8_quality.runs_of([7], 2000, work)}
    args, base = runs[kind], runs["W1.58A16"]
    changed = {k for k, v in vars(args).items() if v != getattr(base, k)} - {"load", "save", "log_dir"}
    expected = {"W1.58A16": set(), "W1.58A8, bf16 GEMMs": {"ternary_activation_bits"}}
    assert changed == expected.get(kind, {"ternary_activation_bits", "ternary_gemm"})
    assert (args.seed, args.train_iters, args.tensor_model_parallel_size) == (7, 2000, 1)
    assert args.load == args.save, "a run that was stopped would be refused, for it has checkpoints already"


def test_a_gap_is_the_mean_over_seeds_with_students_interval(work: Path) -> None:
    losses = {"W1.58A8, int8 GEMMs": (3.02, 2.98, 3.03), "W1.58A16": (3.0, 3.0, 3.0)}
    runs = [
        ended(Run(kind, seed, 50, work), {25: loss + 1, 50: loss})
        for kind, values in losses.items()
        for seed, loss in enumerate(values, start=1)
    ]
    training_runs.carry_out(runs, 2)  # all have finished, so that none is started
    found = training_runs.gap(training_runs.last_losses(runs), *losses)
    # The differences 0.02, -0.02, 0.03 have a deviation of 0.02646; the interval is 4.303 / sqrt(3) times that.
    assert found["mean"] == pytest.approx(0.01)
    assert found["high"] - found["mean"] == pytest.approx(0.0657, abs=1e-4)
    assert found["mean"] - found["low"] == pytest.approx(0.0657, abs=1e-4)


@pytest.mark.parametrize("seeds", [["1"], ["1", "1"], [str(s) for s in range(1, 12)]])
def test_seeds_that_no_interval_is_known_for_are_refused(seeds: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as refused:
        int8_quality.main(["--seeds", *seeds])
    assert refused.value.code == 2
    assert "different ones" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- distillation


def test_students_see_equally_many_tokens_and_one_teacher(work: Path) -> None:
    runs = stages.runs_of(2, 200, work)
    found = {(run.kind, run.seed): arguments(run) for run in runs}
    assert len(found) == len(runs) == 1 + 2 * 4
    teacher, first, second = found[stages.TEACHER, 1], found[stages.FIRST, 2], found[stages.SECOND, 2]
    taught, qat = found[stages.TAUGHT, 2], found[stages.QAT, 2]
    assert first.train_iters + second.train_iters == taught.train_iters == qat.train_iters == 200
    assert len({args.global_batch_size * args.seq_length for args in found.values()}) == 1
    assert second.pretrained_checkpoint == first.save and taught.pretrained_checkpoint is None
    assert second.distill_teacher == taught.distill_teacher == teacher.save and qat.distill_teacher is None
    assert not teacher.ternary and all(args.ternary for (kind, _), args in found.items() if kind != stages.TEACHER)
    assert second.lr == pytest.approx(qat.lr / 5) and teacher.hidden_size > qat.hidden_size
    assert all(args.seed == seed for (_, seed), args in found.items())
    # A run comes after those that it waits for, so that it cannot keep them from starting.
    assert all(runs.index(earlier) < runs.index(run) for run in runs for earlier in run.after)


def test_a_run_begins_when_those_before_it_have_ended(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    def carry_out(run: Run) -> None:
        told.append(("begin", run.kind))
        time.sleep(0.2 if run.kind == "slow" else 0.0)
        told.append(("end", run.kind))

    monkeypatch.setattr(Run, "carry_out", carry_out)
    slow = Run("slow", 1, 10, work)
    training_runs.carry_out([slow, Run("other", 1, 10, work), Run("late", 1, 10, work, after=(slow,))], 3)
    assert told.index(("end", "slow")) < told.index(("begin", "late"))
    assert told.index(("end", "other")) < told.index(("end", "slow"))


def test_what_waits_for_a_run_that_failed_is_not_begun(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def carry_out(run: Run) -> None:
        begun.append(run.kind)
        if run.kind == "broken":
            raise FailedError("broken")

    monkeypatch.setattr(Run, "carry_out", carry_out)
    broken = Run("broken", 1, 10, work)
    with pytest.raises(FailedError, match="broken"):
        training_runs.carry_out([broken, Run("late", 1, 10, work, after=(broken,))], 1)
    assert begun == ["broken"]


FALLING = (2.0, 1.9, 1.8, 1.7, 1.6, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("loss", "distill", "said"),
    [
        (3.0, FALLING, None),
        (9.0, FALLING, "no less than the entropy 5.0000: taught from the start, seed 2"),
        (3.0, FALLING[::-1], "taught from the start, seed 2: no nearer to its teacher"),
        (3.0, (), "taught from the start, seed 2: no nearer to its teacher"),
    ],
)
def test_the_demo_is_ok_where_every_part_worked(
    loss: float, distill: tuple[float, ...], said: str | None, work: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    for run in stages.runs_of(2, 200, work):
        odd = (run.kind, run.seed) == (stages.TAUGHT, 2)
        learned = (distill if odd else FALLING) if run.kind in (stages.SECOND, stages.TAUGHT) else ()
        ended(run, {run.iterations // 2: 4.0, run.iterations: loss if odd else 3.5}, learned)
    monkeypatch.setattr(stages.demo, "unigram_entropy", lambda path: 5.0)
    status = stages.main(["--seeds", "2", "--work", str(work)])
    out, err = capsys.readouterr()
    assert (work / "distillation_stages.png").is_file()
    found = json.loads((work / "distillation_stages.json").read_text())
    assert found["losses"]["QAT"] == {"1": 3.5, "2": 3.5}
    if said is None:
        assert status == 0 and out.splitlines()[-1] == "demo-distill: ok"
        assert found["gaps"][stages.TAUGHT]["mean"] == pytest.approx(-0.25)
        assert "taught from the start" in out and "-0.2500" in out
    else:
        assert status == 3 and said in err and "demo-distill: ok" not in out


# ------------------------------------------------------------------------------------------------- quantization errors


@pytest.mark.parametrize("statistic", ["absmean", "absmax"])
@pytest.mark.parametrize("space", SPACES)
def test_errors_and_shares_are_those_of_the_nearest_levels(space: str, statistic: str) -> None:
    """The weights have several widths and magnitudes; errors are recomputed with the nearest level."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, columns, generator=generator) * n for n, columns in ((5, 64), (3, 96))]
    config = QuantizerConfig(space, 32, statistic=statistic, scale_multiplier=0.5)
    levels, squares, energy, counts = np.array(SPACES[space].levels), 0.0, 0.0, np.zeros(len(SPACES[space].levels))
    for weight in weights:
        rows = weight.reshape(-1, 32).double().numpy()
        magnitudes = np.abs(rows)
        scales = 0.5 * (magnitudes.mean(1) if statistic == "absmean" else magnitudes.max(1))
        scales = torch.from_numpy(scales).bfloat16().double().numpy()[:, None]
        nearest = np.abs(rows[..., None] / scales[..., None] - levels).argmin(-1)
        squares += ((levels[nearest] * scales - rows) ** 2).sum()
        energy += (rows**2).sum()
        counts += np.bincount(nearest.ravel(), minlength=len(levels))
    latent = space_errors.Latent.of(weights, 32)
    assert latent.error(config) == pytest.approx(squares / energy, rel=1e-5)
    assert latent.shares(config) == pytest.approx(list(counts / counts.sum()), abs=1e-12)


def test_the_best_multiple_is_marked_where_the_grid_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = space_errors.Latent.of(space_errors.gaussian(64, 512, 1))
    monkeypatch.setattr(space_errors, "GRIDS", {"absmean": [1.3, 1.55, 1.8], "absmax": [0.6, 0.7, 0.8]})
    ternary = space_errors.table(latent)[2]
    assert "| 1.55: 0.1" in ternary and "| 0.6 (the edge of the grid): " in ternary


@pytest.fixture
def latent_model(tmp_path: Path) -> Path:
    tiny_hf.latent_export(tmp_path / "latent", tiny_hf.architecture(), tiny_hf.record(latent_dtype="bfloat16"))
    return tmp_path / "latent"


@pytest.mark.slow
def test_weights_are_the_linears_of_a_model_however_it_is_kept(latent_model: Path, tmp_path: Path) -> None:
    """Megatron's checkpoints join linears, with rows in another order, but the sums are the same."""
    command = ["--load-dir", latent_model, "--save-dir", tmp_path / "megatron"]
    assert convert_hf_to_megatron.main([str(c) for c in command]) == 0
    everything = load_file(latent_model / "model.safetensors")
    linears = [everything[f"{module}.weight"] for module in tiny_hf.record().modules]
    expected = space_errors.Latent.of(linears)
    config = QuantizerConfig("five-value", statistic="absmean", scale_multiplier=1.05)
    for path in (latent_model, latent_model / "model.safetensors", tmp_path / "megatron"):
        found = space_errors.Latent.of(space_errors.trained(path, None, -1))
        assert found.energy == pytest.approx(expected.energy, rel=1e-12)
        assert found.error(config) == pytest.approx(expected.error(config), rel=1e-12)
        assert found.shares(config) == expected.shares(config)
    some = space_errors.trained(latent_model, 3, -1)
    assert {len(weight) for weight in some} == {3} and len(some) == 14
    first = everything["model.layers.0.mlp.down_proj.weight"].float()
    assert any(torch.equal(weight, first[[0, 21, 42]]) for weight in some)


@pytest.mark.slow
def test_weights_that_cannot_be_measured_are_refused(latent_model: Path, tmp_path: Path, capsys) -> None:
    assert qat_convert.main(["--input_bin", str(latent_model), "--output", str(tmp_path / "fused")]) == 0
    with pytest.raises(FileError, match="_proj is quantized already, to ternary: give the latent weights"):
        space_errors.trained(tmp_path / "fused", None, -1)
    with pytest.raises(FileError, match="_proj.*: group_size=128 does not divide"):
        space_errors.trained(latent_model, None, 128)
    save_file({"a": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    for path, said in ((tmp_path / "a.safetensors", "there are no linears"), (tmp_path / "not", "no such directory")):
        assert space_errors.main(["--weights", str(path)]) == 2
        assert said in capsys.readouterr().err
    for name in ("nan", "zero"):
        weights = {"model.layers.0.mlp.up_proj.weight": torch.full((2, 32), torch.nan if name == "nan" else 0.0)}
        save_file(weights, tmp_path / f"{name}.safetensors")
        assert space_errors.main(["--weights", str(tmp_path / f"{name}.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "up_proj holds NaN or infinity" in said and "all of its weights are zero" in said
    with pytest.raises(SystemExit) as refused:
        space_errors.main(["--weights", str(latent_model), "--seed", "2"])
    assert refused.value.code == 2 and "--columns and --seed are of Gaussian rows" in capsys.readouterr().err
