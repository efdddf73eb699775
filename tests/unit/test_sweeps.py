# SPDX-License-Identifier: Apache-2.0
"""Tests of sweeps: the runs of a file, their names, the results from their logs, and every refusal."""

import argparse
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bitcpm_megatron.files import FileError
from bitcpm_megatron.files.lock import FileLock
from bitcpm_megatron.launch import sweep as command
from bitcpm_megatron.launch.launcher import packaged
from bitcpm_megatron.launch.launcher.torchrun import host_argv
from bitcpm_megatron.launch.sweeper import report, running
from bitcpm_megatron.launch.sweeper.inputs import Inputs
from bitcpm_megatron.launch.sweeper.results import results_of
from bitcpm_megatron.launch.sweeper.running import failure
from bitcpm_megatron.launch.sweeper.runs import FAILED, FINISHED, UNFINISHED, Run, runs_of
from bitcpm_megatron.launch.sweeper.sweep_file import read_sweep

STEPS = 20
BASE = {
    "model": {"preset": "tiny-minicpm4", "seq-length": 32, "make-vocab-size-divisible-by": 64},
    "training": {"micro-batch-size": 1, "train-iters": STEPS, "lr": 1e-3, "bf16": True},
    "data": {"mock-data": True, "vocab-size": 300, "eval-iters": 1},
    "logging": {"log-interval": 5},
}
SWEEP = {"base": BASE, "grid": {"lr": [1e-3, 2e-3, 4e-3]}, "seeds": [1, 2], "last-records": 2}
ARMS = {"BF16": {}, "fine": {"ternary": True, "ternary-group-size": 32}}


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., list[Run]]:
    """Returns a function that returns the runs of ``SWEEP`` with changed keys; None removes a key."""

    def of(**changes: object) -> list[Run]:
        return runs_of(read_sweep(str(written(tmp_path, **changes))), tmp_path / "out", Inputs())

    return of


def written(directory: Path, **changes: object) -> Path:
    content = {**SWEEP, **{key.replace("_", "-"): value for key, value in changes.items()}}
    path = directory / "sweep.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def based_on(section: str, **flags: object) -> dict[str, dict]:
    return {**BASE, section: {**BASE.get(section, {}), **{k.replace("_", "-"): v for k, v in flags.items()}}}


def names(found: list[Run]) -> dict[tuple[str, int], str]:
    return {(run.arm.name, run.seed): run.name for run in found}


# ------------------------------------------------------------------------------------------------------- expansion


def test_every_arm_trains_with_every_value_and_every_seed(runs: Callable) -> None:
    found = runs(arms=ARMS)
    flags = [(run.job.flags.get("ternary-group-size"), run.job.flags["lr"], run.job.flags["seed"]) for run in found]
    arms = [(group, lr) for group in (None, 32) for lr in (1e-3, 2e-3, 4e-3)]
    assert flags == [(*arm, seed) for seed in (1, 2) for arm in arms], "the first seed of every arm comes first"
    assert [run.title for run in found][4] == "fine, lr=0.002, seed 1"
    argv = host_argv(found[4].job)
    assert argv[argv.index("--ternary-group-size") + 1] == "32" and argv[argv.index("--lr") + 1] == "0.002"
    where = {flag: argv[argv.index(flag) + 1] for flag in ("--save", "--load", "--log-dir")}
    assert where["--save"] == where["--load"] == f"{where['--log-dir']}/checkpoint"
    assert len({run.directory for run in found}) == len(found) == 12


def test_without_arms_and_grid_the_seeds_alone_are_run(runs: Callable) -> None:
    assert [(run.arm.name, run.seed) for run in runs(grid=None)] == [("base", 1), ("base", 2)]


def test_a_base_by_name_and_in_the_file_are_the_same(runs: Callable) -> None:
    job = yaml.safe_load(packaged.files("jobs")["tiny-cpu"].read_text())
    by_name, in_file = (names(runs(base=base, last_records=4)) for base in ("tiny-cpu", job))
    assert by_name == in_file
    command_line = running.command(runs(base="tiny-cpu", last_records=4)[0].job)
    # Launches that run at the same time use different ports.
    assert "--rdzv_endpoint 127.0.0.1:0" in " ".join(command_line) and "--nproc_per_node 2" in " ".join(command_line)


@pytest.mark.parametrize("name", packaged.files("sweeps"))
def test_the_sweeps_of_the_package_are_sound(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("data/train_text_document", "data/valid_text_document", "data/tokenizer.model")
    found = runs_of(read_sweep(name), tmp_path / "out", Inputs(dict.fromkeys(data, "0")))
    assert len(found) == 3 * len({run.arm.name for run in found})
    assert all(run.evaluates and run.iterations == 200 for run in found)


# ------------------------------------------------------------------------------------------------------------ names


def test_names_are_of_the_content(runs: Callable) -> None:
    before = names(runs())
    assert names(runs()) == before and len(set(before.values())) == 6
    turned = {key: dict(reversed(list(BASE[key].items()))) for key in reversed(BASE)}
    assert names(runs(base=turned, grid={"lr": [4e-3, 1e-3, 2e-3]}, seeds=[2, 1])) == before
    exported = [names(runs(base=based_on("cluster", environment=dict.fromkeys(order, "1")))) for order in ("AB", "BA")]
    assert exported[0] == exported[1]
    # Names do not depend on where and how often runs save, on the sweep's own description, or on explicit defaults.
    assert names(runs(base=based_on("checkpoint", save="elsewhere", save_interval=3))) == before
    assert names(runs(base=based_on("training", lr=7e-3, seed=5), description="other", baseline="lr=0.001")) == before
    assert names(runs(base=based_on("training", weight_decay=0.01))) == before
    plain, in_full = ({"ternary": True, **more} for more in ({}, {"ternary_statistic": "absmean"}))
    assert names(runs(base=based_on("ternary", **plain))) == names(runs(base=based_on("ternary", **in_full)))


@pytest.mark.parametrize(
    "base",
    [
        based_on("training", weight_decay=0.02),
        based_on("training", train_iters=STEPS + 5),
        based_on("logging", log_interval=4),
        based_on("ternary", ternary=True),
        based_on("model", preset="tiny-llama"),
        based_on("cluster", environment={"A": "1"}),
        based_on("cluster", devices_per_node=2),
    ],
)
def test_names_change_with_what_is_trained(base: dict, runs: Callable) -> None:
    before = set(names(runs()).values())
    assert not before & set(names(runs(base=base)).values())


def test_another_value_leaves_the_names_of_the_others(runs: Callable) -> None:
    before = names(runs())
    after = names(runs(grid={"lr": [5e-4, 1e-3, 2e-3, 4e-3]}, seeds=[1, 2, 3]))
    assert len(after) == 12 and {key: after[key] for key in before} == before
    # The same training has the same name, whatever its arm is called.
    renamed = names(runs(grid=None, arms={"slow": {"lr": 1e-3}, "fast": {"lr": 4e-3}}))
    assert renamed["fast", 2] == before["lr=0.004", 2]


def test_names_are_of_the_content_of_files(runs: Callable, tmp_path: Path) -> None:
    recipe, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"
    recipe.write_text("configs: {a: {group_size: 32}}\nmatchers: {}\n")
    again.write_text(recipe.read_text())
    found = [names(runs(base=based_on("ternary", ternary=True, ternary_recipe=str(p)))) for p in (recipe, again)]
    recipe.write_text(recipe.read_text().replace("32", "64"))
    changed = names(runs(base=based_on("ternary", ternary=True, ternary_recipe=str(recipe))))
    assert found[0] == found[1] and not set(found[0].values()) & set(changed.values())


def reading(**paths: object) -> argparse.Namespace:
    """Returns those arguments of a run that say what it reads."""
    names = "data_path train_data_path valid_data_path tokenizer_model ternary_recipe pretrained_checkpoint".split()
    nothing = dict.fromkeys([*names, "distill_teacher", "distill_targets"])
    return argparse.Namespace(**{**nothing, "sft": False, "seq_length": 1, **paths})


def test_data_are_their_content_and_their_weights() -> None:
    told = Inputs({"a": "one", "b": "two", "copy": "one"})
    blends = ["1 a 2 b", "1 copy 2 b", "2 a 1 b", "1 b 2 a", "a b"]
    found = [told.of(reading(data_path=blend.split())) for blend in blends]
    assert found[0] == found[1] and all(found.count(one) == 1 for one in found[2:])
    assert told.of(reading(train_data_path=["a"])) != told.of(reading(valid_data_path=["a"]))


def test_what_was_read_need_not_be_there_for_a_report(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"one")
    told, args = Inputs(), reading(tokenizer_model=str(file))
    before = told.of(args)
    told.record(tmp_path)
    file.unlink()
    assert Inputs.recorded(tmp_path).of(args) == before != {}
    with pytest.raises(FileError, match="tokenizer.model: there is no such file"):
        Inputs().of(args)


def test_a_checkpoint_is_its_newest_iteration(tmp_path: Path) -> None:
    def saved(iteration: int, content: str) -> dict:
        directory = tmp_path / f"iter_{iteration:07d}"
        directory.mkdir(exist_ok=True)
        (directory / "metadata.json").write_text(content)
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return Inputs().of(reading(distill_teacher=str(tmp_path)))

    first = saved(1, "one")
    assert saved(1, "one") == first and saved(2, "two") != first and saved(3, "one") == first
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="there is nothing in this directory"):
        Inputs().of(reading(distill_teacher=str(tmp_path / "empty")))


# ---------------------------------------------------------------------------------------------------------- results


def logged(run: Run, loss: float, steps: int = STEPS, valid: float | None = None) -> None:
    """Writes what a run has logged up to a step; the mean of its last two records is the loss."""
    run.directory.mkdir(parents=True, exist_ok=True)
    losses = {5: 9.0, 10: 8.0, 15: loss - 0.5, 20: loss + 0.5}
    records = [{"kind": "train", "iteration": i, "lm_loss": value} for i, value in losses.items() if i <= steps]
    if steps == STEPS:
        records.append({"kind": "valid", "iteration": STEPS, "lm_loss": loss if valid is None else valid})
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def finished(run: Run, loss: float, valid: float | None = None) -> None:
    """Writes a complete log and the record of a successful end."""
    logged(run, loss, valid=valid)
    run.end("finished")


def test_means_differences_and_intervals(runs: Callable, tmp_path: Path) -> None:
    found = runs(arms=ARMS, grid=None, seeds=[1, 2, 3], baseline="BF16")
    values = {"BF16": (3.0, 3.0, 3.0), "fine": (3.02, 2.98, 3.03)}
    for run in found:
        finished(run, values[run.arm.name][run.seed - 1] + 1, valid=values[run.arm.name][run.seed - 1])
    results = results_of(read_sweep(str(tmp_path / "sweep.yaml")), found)
    base, fine = results.rows
    assert results.judged == "validation" and base.reference is None and fine.reference is base.arm
    assert base.training == {"mean": pytest.approx(4.0), "low": pytest.approx(4.0), "high": pytest.approx(4.0)}
    # The differences 0.02, -0.02, 0.03 have a deviation of 0.02646; the interval is 4.303 / sqrt(3) times that.
    assert fine.difference["mean"] == pytest.approx(0.01)
    assert fine.difference["high"] - 0.01 == pytest.approx(0.0657, abs=1e-4)
    assert 0.01 - fine.difference["low"] == pytest.approx(0.0657, abs=1e-4)
    text = "\n".join(report.table(results))
    assert "| fine | 3 | 4.0100 (3.9443 to 4.0757) | 3.0100 (2.9443 to 3.0757) | +0.0100 (-0.0557 to +0.0757) |" in text
    assert "| BF16 | 3 | 4.0000 (4.0000 to 4.0000) | 3.0000 (3.0000 to 3.0000) | baseline |" in text


def test_arms_are_compared_with_the_one_that_is_like_them_otherwise(runs: Callable, tmp_path: Path) -> None:
    found = runs(arms=ARMS, seeds=[4], baseline="BF16")
    for run in found:
        finished(run, 3.0 + run.job.flags["lr"] * 100 + (run.arm.values["arm"] == "fine"))
    rows = results_of(read_sweep(str(tmp_path / "sweep.yaml")), found).rows
    assert [row.reference and row.reference.name for row in rows[3:]] == [
        f"BF16, lr={lr}" for lr in (0.001, 0.002, 0.004)
    ]
    # With one seed, there is a difference but no interval.
    assert [row.difference for row in rows] == [None] * 3 + [{"mean": pytest.approx(1.0)}] * 3
    sweep = read_sweep(str(written(tmp_path, arms=ARMS, seeds=[4], baseline={"arm": "BF16", "lr": 2e-3})))
    assert {sweep.reference(arm).name for arm in sweep.arms if sweep.reference(arm)} == {"BF16, lr=0.002"}
    sweep = read_sweep(str(written(tmp_path, arms=ARMS, seeds=[4], baseline="BF16, lr=0.004")))
    assert [sweep.reference(arm) for arm in sweep.arms].count(None) == 1


def test_what_failed_or_has_not_ended_stands_in_the_table(runs: Callable, tmp_path: Path) -> None:
    found = {(run.arm.name, run.seed): run for run in runs(baseline="lr=0.002")}
    for (arm, seed), run in found.items():
        if arm == "lr=0.002":
            finished(run, 2.0 + seed)
    finished(found["lr=0.001", 1], 3.5)
    logged(found["lr=0.001", 2], 9.0, steps=10)
    found["lr=0.004", 1].directory.mkdir(parents=True)
    found["lr=0.004", 1].end("failed", f"{found['lr=0.004', 1].directory}/x: the loss is nan | diverged")
    results = results_of(read_sweep(str(tmp_path / "sweep.yaml")), list(found.values()))
    assert [results.count(state) for state in (FINISHED, UNFINISHED, FAILED)] == [3, 2, 1]
    text = "\n".join(report.table(results))
    assert "6 runs: 3 finished, 2 unfinished, 1 failed." in text
    # The difference is that of the seed which both have finished.
    assert "| lr=0.001 | 1 of 2 | 3.5000 | 3.5000 | +0.5000 |  |" in text
    assert "| lr=0.004 | 0 of 2 | - | - | - | seed 1 failed: x: the loss is nan \\| diverged |" in text
    assert f"| {found['lr=0.001', 2].name} | lr=0.001 | 2 | unfinished | - | - | 10 of 20 steps |" in text
    assert f"| {found['lr=0.004', 1].name} | lr=0.004 | 1 | failed | - | - | x: the loss is nan \\| diverged |" in text
    assert str(tmp_path) not in text, "the same table wherever a sweep lies"
    # In the reverse case, the baseline lacks a seed.
    turned = results_of(replace(results.sweep, baseline={"lr": 1e-3}), list(found.values()))
    assert [row.difference for row in turned.rows] == [None, {"mean": pytest.approx(-0.5)}, None]


def test_a_log_that_lacks_the_last_validation_is_of_no_finished_run(runs: Callable) -> None:
    run = runs()[0]
    finished(run, 3.0)
    assert run.result(2).state == FINISHED
    path = run.directory / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "valid" not in line))
    assert run.result(2).state == UNFINISHED
    path.write_text("{}\n")
    assert run.result(2).state == FAILED and "metrics.jsonl, line 1: no record of a run" in run.result(2).reason


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ((3.0, 2.0, 2.5), None),
        ((2.0, 2.1, 2.5), "lr=0.001"),
        ((3.0, 2.5, 2.0), "lr=0.004"),
        ((2.5, 2.0, None), None),  # a run next to the best one has failed
        ((None, 2.0, 2.5), None),
        ((None, 2.5, 2.0), "lr=0.004"),
    ],
)
def test_the_best_value_at_the_border_is_marked(
    losses: tuple, edge: str | None, runs: Callable, tmp_path: Path
) -> None:
    order = [2e-3, 4e-3, 1e-3]
    found = runs(grid={"lr": order}, optimum="lr")
    for run in found:
        loss = losses[sorted(order).index(run.job.flags["lr"])]
        if loss is not None or run.seed == 1:
            finished(run, 1.0 if loss is None else loss)  # one good seed does not make a value the best
        else:
            run.directory.mkdir(parents=True)
            run.end("failed", "diverged")
    results = results_of(read_sweep(str(tmp_path / "sweep.yaml")), found)
    assert [row.arm.name for row in results.rows if row.at_the_edge] == ([edge] if edge else [])
    assert ("at the edge of lr" in "\n".join(report.table(results))) == bool(edge)
    logged(found[0], 3.0, steps=10)
    assert not any(row.at_the_edge for row in results_of(results.sweep, found).rows), (
        "of what still goes on nothing is said"
    )


@pytest.mark.verifies(
    "trust",
    "the results table of a sweep (a grid of training runs) is computed from its logs only, and lists the runs that "
    "failed",
    cuda="-",
    npu="-",
)
def test_the_report_is_made_of_the_logs_alone(runs: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = runs(arms=ARMS, baseline="BF16", optimum="lr")
    for number, run in enumerate(found):
        finished(run, 3.0 + number / 10, valid=float("nan") if number == 0 else None)
    argv = [str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out")]
    assert command.main([*argv, "--report-only"]) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("results.*")}
    assert sorted(first) == ["results.json", "results.md", "results.png"]
    assert first["results.png"].startswith(b"\x89PNG") and "| fine, lr=0.004 | 2 |" in capsys.readouterr().out
    content = json.loads(first["results.json"], parse_constant=pytest.fail)
    assert content["runs"][0]["validation"] is None and content["arms"][3]["flags"]["lr"] == 1e-3
    assert [run["training"] for run in content["runs"]] == [pytest.approx(3.0 + n / 10) for n in range(len(found))]
    for path in (tmp_path / "out").glob("results.*"):
        path.unlink()
    assert command.main([*argv, "--report-only"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("results.*")} == first


def test_a_run_that_was_killed_behind_its_last_record_is_reported_as_it_is_run_again(
    runs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: None)  # drawing takes most of the time
    found = runs(grid=None, seeds=[1, 2, 3])
    for run in found[:2]:
        finished(run, 3.0)
    logged(found[2], 4.0)
    argv = [str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out")]
    assert command.main([*argv, "--report-only"]) == 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert "3 runs: 2 finished, 1 unfinished, 0 failed." in table
    assert f"| {found[2].name} | base | 3 | unfinished | - | - | 20 of 20 steps |" in table
    assert "| base | 2 of 3 | 3.0000 (3.0000 to 3.0000) |" in table, "its losses are not among the means"
    processes = Processes(monkeypatch, found)
    assert command.main(argv) == 0
    assert processes.begun == ["base, seed 3"]
    assert "3 runs: 3 finished, 0 unfinished, 0 failed." in (tmp_path / "out" / "results.md").read_text()


# --------------------------------------------------------------------------------------------------------- attempts


@pytest.mark.parametrize(
    ("status", "said", "reason", "killed"),
    [
        (-9, "error: earlier\n", "ended by SIGKILL", "SIGKILL"),
        (-15, "", "ended by SIGTERM", "SIGTERM"),
        (-signal.SIGSEGV, "", "ended by SIGSEGV", ""),
        (2, "train:  5%|\rerror: two\n  lines, b\nafter\n", "two lines, b", ""),
        (1, "Traceback (most recent call last):\n  File\nRuntimeError: boom\n", "RuntimeError: boom", ""),
        (1, "", "exit status 1", ""),
        (1, "x\nerror: the process of local rank 0 ended by SIGKILL\n", "ended by SIGKILL", "SIGKILL"),
        (1, "KeyError: 'a'\nerror: the process of local rank 1 ended with status 1\n", "KeyError: 'a'", ""),
        (2, "error: bad\nerror: the process of local rank 1 ended with status 2\n", "bad", ""),
    ],
)
def test_why_a_process_ended(status: int, said: str, reason: str, killed: str) -> None:
    assert failure(status, said) == (reason, killed)


class Processes:
    """A double of processes that defines, by the title of a run, what it logs and prints and how it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> None:
        self._runs = {run.job.flags["save"]: run for run in runs}
        self.ends: dict[str, tuple[int, str]] = {}
        self.begun: list[str] = []
        monkeypatch.setattr(running.Supervisor, "start", self._start)
        monkeypatch.setattr(running, "_SECONDS", 0.0)

    def _start(self, argv: list[str], variables: dict, output) -> "Processes.Ended":
        run = self._runs[argv[argv.index("--save") + 1]]
        self.begun.append(run.title)
        status, said = self.ends.get(run.title, (0, ""))
        output.write(said.encode())
        if status == 0 and not said:
            logged(run, 3.0)
        assert "RANK" not in variables and variables["OMP_NUM_THREADS"]
        return self.Ended(status)

    class Ended:
        def __init__(self, status: int) -> None:
            self._status = status

        def poll(self) -> int:
            return self._status


def test_what_has_finished_is_not_run_again_and_what_has_failed_only_if_asked(
    runs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(report, "draw", lambda *_: None)  # drawing takes most of the time
    found = runs()
    processes = Processes(monkeypatch, found)
    argv = [str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out"), "--parallel", "4"]
    processes.ends = {
        "lr=0.001, seed 1": (1, "error: the loss is nan: training has diverged\n"),
        "lr=0.002, seed 2": (-9, ""),
        "lr=0.004, seed 1": (0, "asked to stop by SIGTERM or SIGUSR1\n"),
    }
    assert command.main(argv) == 1
    assert len(processes.begun) == 6
    assert "of 6 runs 2 have not ended, and 1 have failed" in capsys.readouterr().err
    assert "seed 1 failed: the loss is nan" in (tmp_path / "out" / "results.md").read_text()

    processes.begun, processes.ends = [], {}
    assert command.main(argv) == 1
    assert sorted(processes.begun) == ["lr=0.002, seed 2", "lr=0.004, seed 1"]

    processes.begun = []
    assert command.main([*argv, "--retry-failed"]) == 0
    assert processes.begun == ["lr=0.001, seed 1"]
    processes.begun = []
    written(tmp_path, grid={"lr": [1e-3, 8e-3]})
    monkeypatch.setattr(processes, "_runs", {r.job.flags["save"]: r for r in runs(grid={"lr": [1e-3, 8e-3]})})
    assert command.main(argv) == 0
    assert processes.begun == ["lr=0.008, seed 1", "lr=0.008, seed 2"], "a value more runs its own runs alone"
    assert "holds 4 runs that this file does not name; they are left alone" in capsys.readouterr().out
    (found[0].directory / "outcome.json").write_text("{")
    assert command.main([*argv, "--report-only"][:3] + ["--report-only"]) == 0
    assert "outcome.json: not valid JSON" in (tmp_path / "out" / "results.md").read_text()


def test_one_sweep_at_a_time_writes_into_a_directory(
    runs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs()
    # The lock belongs to another process, because a lock of this one would not exclude it.
    monkeypatch.setattr(FileLock, "_try", lambda self: setattr(self, "_file", _opened(tmp_path)) or False)
    monkeypatch.setattr("bitcpm_megatron.files.lock._PATIENCE_SECONDS", -1.0)
    assert command.main([str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "is that of a sweep that runs now (sweep.py, process 7 on a, since b)" in capsys.readouterr().err


def _opened(directory: Path) -> int:
    (directory / "lock").write_text("\nsweep.py, process 7 on a, since b\n")
    return os.open(directory / "lock", os.O_RDWR)


# --------------------------------------------------------------------------------------------------------- refusals

MEGATRON_LM = {**BASE, "host": {"kind": "megatron-lm", "megatron-path": "/m"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": {"lrr": [1]}}, "grid: unknown flag lrr: did you mean lr?"),
        ({"grid": {"lr": []}}, "grid.lr: it has no values"),
        ({"grid": {"lr": 3}}, "grid.lr: expected a list"),
        ({"grid": {"lr": ["x"]}}, "grid: lr: 'x': expected a number"),
        ({"grid": {"lr": [-1.0]}}, "grid: lr: -1.0: must be above 0"),
        ({"grid": {"lr": [1e-3, 0.001]}}, "grid.lr: 0.001 stands there twice"),
        ({"grid": {"ternary-group-size": [48]}}, "ternary-group-size: 48: must be -1"),
        ({"grid": {"bf16": ["yes"]}}, "bf16: expected true or false"),
        ({"grid": {"seed": [1, 2]}}, "grid.seed: seeds: has them"),
        ({"grid": {"save": ["a"]}}, "grid.save: every run has a directory of its own"),
        ({"grid": {"exit-interval": [3]}}, "grid.exit-interval: a run goes to its end"),
        (
            {"grid": {"lr": [i / 1000 for i in range(1, 40)], "weight-decay": [i / 100 for i in range(40)]}},
            "1,560 arms",
        ),
        ({"grid": {"min-lr": [1e-4, 2e-3]}}, "arm min-lr=0.002: --min-lr 0.002 is above --lr 0.001"),
        ({"grid": {"ternary-group-size": [-1, 32]}}, "arm ternary-group-size=32: --ternary"),
        ({"grid": {"hidden-size": [100000000]}}, "hidden-size: 100000000: must be 1 to 1048576"),
        ({"arms": {"a": {"lr": 1e-3}}}, "arms.a.lr: grid has it, too"),
        ({"arms": {"a": {}, "b": {"bf16": True}}}, "the arms a, lr=0.001 and b, lr=0.001 are one training"),
        ({"arms": {"a": {"weight-decai": 0.0}}}, "arms.a: unknown flag weight-decai: did you mean weight-decay?"),
        ({"arms": {"a|b": {}}}, "is no name of up to 64 characters"),
        ({"seeds": None}, "seeds is missing"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "seeds: 1 stands there twice"),
        ({"seeds": [1.5]}, "seeds.0: 1.5: expected a whole number"),
        ({"seeds": [-1]}, "seeds.0: -1: must be 0 to"),
        ({"seeds": list(range(11))}, "seeds: "),
        ({"baseline": "lr=0.003"}, "baseline: there is no arm 'lr=0.003'"),
        ({"baseline": {"lr": 3e-3}}, "baseline.lr: 0.003 is none of 0.001, 0.002, 0.004"),
        ({"baseline": {"lrr": 3e-3}}, "baseline: 'lrr' is no axis of this sweep"),
        ({"baseline": 3}, "baseline: expected the name of an arm"),
        ({"optimum": "min-lr"}, "optimum: 'min-lr' is not in the grid"),
        ({"optimum": "lr", "grid": {"lr": [1e-3, 2e-3]}}, "optimum: lr needs 3 numbers at least"),
        ({"last-records": 0}, "last-records: 0: must be 1 to"),
        ({"last-records": 5}, "a run logs 4 times, and last-records is 5: give last-records: 4"),
        ({"best": 1}, "unknown key best"),
        ({"base": None}, "base is missing"),
        ({"base": 3}, "base: expected the name of a job"),
        ({"base": "no-such-job"}, "base: no-such-job: no such job file"),
        ({"base": "two-stage"}, "it has stages (qat, distill)"),
        ({"base": MEGATRON_LM}, "base: host.kind megatron-lm: a sweep trains with the built-in host"),
        ({"base": based_on("training", lrr=1)}, "base: unknown key training.lrr"),
        ({"base": based_on("cluster", nodes=2)}, "base: cluster.nodes 2: a sweep runs on the machine"),
        ({"base": based_on("cluster", profile="no-such")}, "base: cluster.profile no-such: no such profile file"),
        ({"base": based_on("cluster", max_restarts=1)}, "base: cluster.max-restarts: a sweep's runs meet nobody"),
        ({"base": based_on("checkpoint", load="a")}, "base: checkpoint.load: a run goes to its end"),
        (
            {"base": based_on("parallelism", tensor_model_parallel_size=2)},
            "1 processes cannot be split into groups of 2",
        ),
        ({"base": based_on("data", mock_data=False, data_path=["no"], tokenizer_model="t")}, "no.idx is not there"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(
    changes: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(running.Supervisor, "start", lambda *_: pytest.fail("something was started"))
    path = written(tmp_path, **changes)
    assert command.main([str(path), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {path}: ") and said in told and "Traceback" not in told
    assert not (tmp_path / "out").exists(), "nothing is left of what was refused"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["no-such.yaml"], "no-such.yaml: no such sweep file, and no sweep of that name: choose one of group_size"),
        (["sweep.yaml", "--parallel", "0"], "--parallel: '0': must be 1 to 1024"),
        (["sweep.yaml", "--report-only", "--retry-failed"], "--report-only runs nothing"),
        (["sweep.yaml", "--report-only", "--output", "missing"], "nothing of this sweep has run there"),
        (["sweep.yaml", "--output", "sweep.yaml"], "sweep.yaml is no directory"),
    ],
)
def test_arguments_are_refused(argv: list[str], said: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    try:
        status = command.main(argv)
    except SystemExit as refused:
        status = refused.code
    assert status == 2 and said in capsys.readouterr().err
