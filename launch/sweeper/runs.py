# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep: each is an arm with a seed, named by a digest of everything that determines its result."""

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

RUNS = "runs"  # folder of the runs in the directory of a sweep
FINISHED: Final = "finished"
FAILED: Final = "failed"
UNFINISHED: Final = "unfinished"
_OUTCOME = "outcome.json"
# Arguments that do not change what a run logs. Paths of files that it reads are replaced by digests of their content.
_OF_NO_RESULT = (
    *("save", "load", "log_dir", "save_interval", "async_save", "keep_last_n", "data_cache_path"),
    *("exit_signal_handler", "distributed_timeout_minutes", "num_workers", "verify_digests"),
)


class _Outcome(Strict):
    """The outcome of a run, a file in its directory; a run that was killed or asked to stop has none."""

    outcome: Literal["finished", "failed"]
    reason: str = ""  # reason of a failure, one line


@dataclass(frozen=True)
class _Log:
    """The log of a run: the steps so far, the losses of its records in order, and the validation losses by step."""

    steps: int
    training: Sequence[float]
    validation: Mapping[int, float]


@dataclass(frozen=True)
class Result:
    """The result of a run so far.

    Attributes:
        state: ``finished``, ``failed`` or ``unfinished``.
        reason: the reason of a failure, one line.
        steps: the number of steps logged so far.
        training: the mean loss over the last records, in nats per token; only for a finished run.
        validation: the last validation loss, in nats per token; only for a finished run that evaluates.
    """

    state: Literal["finished", "failed", "unfinished"]
    reason: str = ""
    steps: int = 0
    training: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class Run:
    """A run of a sweep: one arm trained with one seed.

    Attributes:
        name: a digest of everything that determines the result; also the name of the directory.
        job: the job that is run, with directories of its own.
        iterations: the number of iterations of the whole run.
        evaluates: whether the run ends with a validation loss.
    """

    arm: Arm
    seed: int
    name: str
    job: Job
    iterations: int
    evaluates: bool

    @property
    def title(self) -> str:
        """The name of the run for people."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def directory(self) -> Path:
        """The directory of the logs; checkpoints are in its folder ``checkpoint``."""
        return Path(self.job.flags["log-dir"])

    def result(self, last_records: int) -> Result:
        """Returns the result so far: finished if the log is complete and the process has saved and ended well.

        Args:
            last_records: the number of records at the end of the log over which the training loss is averaged.
        """
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
        """Returns whether the run has logged everything that it should, whatever happened to its process afterwards."""
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
        """Returns the recorded outcome; None for a run that has not ended.

        Raises:
            FileError: if the file of the outcome is damaged.
        """
        path = self.directory / _OUTCOME
        return validated(_Outcome, read_json(path), str(path)) if path.exists() else None

    def end(self, outcome: Literal["finished", "failed"], reason: str = "") -> None:
        """Records the outcome of the run."""
        content = _Outcome(outcome=outcome, reason=self._local(reason))
        write_text(self.directory / _OUTCOME, content.model_dump_json() + "\n")

    def forget_outcome(self) -> None:
        """Removes the outcome that :meth:`end` has recorded."""
        (self.directory / _OUTCOME).unlink(missing_ok=True)

    def _local(self, text: str) -> str:
        # The table does not depend on the path of the sweep's directory.
        return text.replace(f"{self.directory}/", "")


def runs_of(sweep: Sweep, output: Path, inputs: Inputs) -> list[Run]:
    """Returns the runs of a sweep, ordered by seed and then by arm.

    Args:
        sweep: the sweep.
        output: the directory of the sweep.
        inputs: the digests of the files that the runs read; new ones are added.

    Raises:
        FileError, ValueError: if an arm is not a valid training, two arms are the same training, or a file that an arm
            reads is missing; the message names the arm.
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
    """Returns an arm's run with the first seed, and the arguments that determine its result."""
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
    """Returns a run with another seed, and with the name and the directories that follow from it."""
    cluster, usual = run.job.cluster, _usual()
    said: Mapping[str, Any] = {
        # Defaults are left out, so that flags of later versions do not change the names of existing runs.
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
    """Returns the arguments with the values that a run takes by default for weight decay and the quantizer's scale."""
    decay = WEIGHT_DECAY if args.weight_decay is None else args.weight_decay
    own = QuantizerConfig(
        args.ternary_space, statistic=args.ternary_statistic, scale_multiplier=args.ternary_scale_multiplier
    )
    of_scale = {"ternary_statistic": own.statistic, "ternary_scale_multiplier": own.scale_multiplier}
    # With a recipe, modules may have different spaces with different defaults, so that they are not filled in.
    return {**vars(args), "weight_decay": decay, **(of_scale if args.ternary and args.ternary_recipe is None else {})}


_usual = functools.cache(defaults)


def _job(base: Job, arm: Arm, seed: int, directory: Path, output: Path) -> Job:
    own = {"seed": seed, "save": str(directory / "checkpoint"), "log-dir": str(directory)}
    shared = {"data-cache-path": str(output / "cache")}
    return replace(base, flags={**shared, **base.flags, **arm.flags, **own})


def strangers(runs: Sequence[Run], output: Path) -> int:
    """Returns the number of directories of runs in a sweep's output that belong to none of its arms."""
    ours = {run.name for run in runs}
    return sum(path.name not in ours for path in (output / RUNS).glob("*"))
