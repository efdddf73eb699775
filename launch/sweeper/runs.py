# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep: an arm with a seed, named by the content of what determines its result."""

import argparse
import functools
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from ...files import FileError, Strict, read_json, validated, write_text
from ...files.documents import listed
from ...quantization import QuantizerConfig
from ...training.flags import WEIGHT_DECAY, defaults
from ...training.metrics import METRICS, read_metrics
from ...training.mistakes import mistakes
from ..launcher.job import Job
from .inputs import Inputs
from .sweep_file import Arm, Sweep

RUNS = "runs"  # below the directory of a sweep
FINISHED: Final = "finished"
FAILED: Final = "failed"
UNFINISHED: Final = "unfinished"
_OUTCOME = "outcome.json"
# Arguments that change nothing in what a run logs. Paths of what it reads stand there by content.
_OF_NO_RESULT = (
    *("save", "load", "log_dir", "save_interval", "async_save", "keep_last_n", "data_cache_path"),
    *("exit_signal_handler", "distributed_timeout_minutes", "num_workers", "verify_digests"),
)


class _Outcome(Strict):
    """How a run has ended, in its directory; one that was killed or asked to stop has none."""

    outcome: Literal["finished", "failed"]
    reason: str = ""  # of a failure, one line


@dataclass(frozen=True)
class _Log:
    """What a run has logged: steps so far, losses of the records in their order, validation losses by step."""

    steps: int
    training: Sequence[float]
    validation: Mapping[int, float]


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
        state: ``finished``, ``failed`` or ``unfinished``.
        reason: of a failure, one line.
        steps: logged so far.
        training: mean loss over its last records, in nats per token; of a finished run.
        validation: its last loss; of a finished run that evaluates.
    """

    state: Literal["finished", "failed", "unfinished"]
    reason: str = ""
    steps: int = 0
    training: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class Run:
    """A training of a sweep.

    Attributes:
        name: digest of what determines its result; also that of its directory.
        job: that is run, with directories of its own.
        iterations: of the whole run.
        evaluates: whether it ends with a validation loss.
    """

    arm: Arm
    seed: int
    name: str
    job: Job
    iterations: int
    evaluates: bool

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def directory(self) -> Path:
        """Where it logs, and saves in ``checkpoint``."""
        return Path(self.job.flags["log-dir"])

    def result(self, last_records: int) -> Result:
        """What it has come to. It has finished when its log is whole and its process has ended well, too, and saved."""
        try:
            log, outcome = self._read_log(), self.outcome()
        except FileError as error:
            return Result(FAILED, self._local(str(error)))
        if outcome is not None and outcome.outcome == FAILED:
            return Result(FAILED, outcome.reason, log.steps)
        if outcome is None or not self._is_whole(log):
            return Result(UNFINISHED, "", log.steps)
        training = statistics.fmean(log.training[-last_records:])
        return Result(FINISHED, "", log.steps, training, log.validation.get(self.iterations))

    def log_is_whole(self) -> bool:
        """Whether it has logged all that it should, whatever has become of its process since."""
        try:
            return self._is_whole(self._read_log())
        except FileError:
            return False

    def _read_log(self) -> _Log:
        found = read_metrics(self.directory) if (self.directory / METRICS).is_file() else []
        train = [record for record in found if record["kind"] == "train"]
        valid = {record["iteration"]: record["lm_loss"] for record in found if record["kind"] == "valid"}
        steps = max((record["iteration"] for record in train), default=0)
        return _Log(steps, [record["lm_loss"] for record in train], valid)

    def _is_whole(self, log: _Log) -> bool:
        return log.steps >= self.iterations and (not self.evaluates or self.iterations in log.validation)

    def outcome(self) -> _Outcome | None:
        """How it has ended; None for a run that has not.

        Raises:
            FileError: the file that says so is damaged.
        """
        path = self.directory / _OUTCOME
        return validated(_Outcome, read_json(path), str(path)) if path.exists() else None

    def end(self, outcome: Literal["finished", "failed"], reason: str = "") -> None:
        """Records how it has ended."""
        content = _Outcome(outcome=outcome, reason=self._local(reason))
        write_text(self.directory / _OUTCOME, content.model_dump_json() + "\n")

    def forget_outcome(self) -> None:
        """Takes away what :meth:`end` has recorded."""
        (self.directory / _OUTCOME).unlink(missing_ok=True)

    def _local(self, text: str) -> str:
        # The same table wherever a sweep lies.
        return text.replace(f"{self.directory}/", "")


def runs_of(sweep: Sweep, output: Path, inputs: Inputs) -> list[Run]:
    """The runs of a sweep, the first seed of every arm first.

    Args:
        sweep: whose.
        output: its directory.
        inputs: gets the digests of what the runs read.

    Raises:
        FileError, ValueError: an arm is no training, two are the same one, or what one reads is not there; the message
            names the arm.
    """
    found = [_run(sweep, arm, output, inputs) for arm in sweep.arms]
    names: dict[str, Run] = {}
    for first, _ in found:
        if first.name in names:
            raise FileError(
                f"{sweep.path}: the arms {names[first.name].arm.name} and {first.arm.name} are one training"
            )
        names[first.name] = first
    return [
        first if seed == first.seed else _named(first, args, seed, output, inputs)
        for seed in sweep.seeds
        for first, args in found
    ]


def _run(sweep: Sweep, arm: Arm, output: Path, inputs: Inputs) -> tuple[Run, argparse.Namespace]:
    """An arm's run with the first seed, and the arguments that determine it."""
    job = _job(sweep.base, arm, sweep.seeds[0], output / RUNS / "run", output)
    try:
        args = job.arguments()
        said = argparse.Namespace(**vars(args))
        if found := mistakes(args, job.cluster.devices_per_node):
            raise FileError(listed(found))
        records = -(-args.train_iters // args.log_interval)
        if records < sweep.last_records:
            cure = f"give last-records: {records}, or a smaller log-interval"
            raise FileError(f"a run logs {records} times, and last-records is {sweep.last_records}: {cure}")
        first = Run(arm, sweep.seeds[0], "", job, args.train_iters, args.eval_iters > 0)
        return _named(first, said, sweep.seeds[0], output, inputs), said
    except ValueError as error:
        raise FileError(f"{sweep.path}: arm {arm.name}: {str(error).removeprefix(f'{sweep.path}: ')}") from None


def _named(run: Run, args: argparse.Namespace, seed: int, output: Path, inputs: Inputs) -> Run:
    """The run with a seed and the name that follows."""
    cluster, usual = run.job.cluster, _usual()
    said: Mapping[str, Any] = {
        # Without defaults: a flag that a later version knows changes no name.
        "arguments": {
            name: value
            for name, value in {**_resolved(args), **inputs.of(args), "seed": seed}.items()
            if name not in _OF_NO_RESULT and (name not in usual or value != usual[name])
        },
        "processes": cluster.devices_per_node,
        "profile": cluster.profile,
        "environment": cluster.environment,
    }
    name = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]
    job = _job(run.job, run.arm, seed, output / RUNS / name, output)
    return replace(run, seed=seed, name=name, job=job)


def _resolved(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments, with what is taken where they say nothing of weight decay and of a quantizer's scale."""
    decay = WEIGHT_DECAY if args.weight_decay is None else args.weight_decay
    own = QuantizerConfig(
        args.ternary_space, statistic=args.ternary_statistic, scale_multiplier=args.ternary_scale_multiplier
    )
    of_scale = {"ternary_statistic": own.statistic, "ternary_scale_multiplier": own.scale_multiplier}
    # With a recipe other modules may have other spaces, and a scale that is given holds for them, too.
    return {**vars(args), "weight_decay": decay, **(of_scale if args.ternary and args.ternary_recipe is None else {})}


_usual = functools.cache(defaults)


def _job(base: Job, arm: Arm, seed: int, directory: Path, output: Path) -> Job:
    own = {"seed": seed, "save": str(directory / "checkpoint"), "log-dir": str(directory)}
    shared = {"data-cache-path": str(output / "cache")}
    return replace(base, flags={**shared, **base.flags, **arm.flags, **own})


def strangers(runs: Sequence[Run], output: Path) -> int:
    """How many directories of runs stand there that are of no arm any more."""
    ours = {run.name for run in runs}
    return sum(path.name not in ours for path in (output / RUNS).glob("*"))
