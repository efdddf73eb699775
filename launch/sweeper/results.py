# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep from the logs of its runs: means over seeds, and differences seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .intervals import mean_interval
from .runs import FAILED, FINISHED, Result, Run
from .sweep_file import Arm, Sweep

Loss = Literal["training", "validation"]


@dataclass(frozen=True)
class Row:
    """The results of an arm; its means are over the seeds whose runs have finished.

    Attributes:
        results: the results by seed.
        training: the :func:`~.intervals.mean_interval` of the training losses; None without a finished run.
        validation: the same for validation losses; None also if a finished run has none.
        reference: the arm that this one is compared with, or None.
        difference: the interval of the differences in the judged loss from the reference, over the seeds that both have
            finished; or None.
        at_the_edge: whether the arm is the best along the axis that should have an optimum, and at an end of it.
    """

    arm: Arm
    results: Mapping[int, Result]
    training: dict[str, float] | None
    validation: dict[str, float] | None
    reference: Arm | None
    difference: dict[str, float] | None
    at_the_edge: bool


@dataclass(frozen=True)
class Results:
    """The results of all arms of a sweep, in its order.

    Attributes:
        judged: the loss by which arms are compared: the validation loss if every finished run has one.
    """

    sweep: Sweep
    runs: Sequence[Run]
    judged: Loss
    rows: Sequence[Row]

    def of(self, run: Run) -> Result:
        """Returns the result of a run."""
        return next(row for row in self.rows if row.arm == run.arm).results[run.seed]

    def count(self, state: str) -> int:
        """Returns the number of runs in a state."""
        return sum(result.state == state for row in self.rows for result in row.results.values())


def results_of(sweep: Sweep, runs: Sequence[Run]) -> Results:
    """Reads the logs and outcomes of all runs and returns the results."""
    found: dict[str, dict[int, Result]] = {}
    for run in runs:
        found.setdefault(run.arm.name, {})[run.seed] = run.result(sweep.last_records)
    finished = [result for of in found.values() for result in of.values() if result.state == FINISHED]
    judged: Loss = "training" if any(result.validation is None for result in finished) else "validation"
    losses = {name: _losses(of, judged) for name, of in found.items()}
    edges = _edges(sweep, found, losses)
    rows = []
    for arm in sweep.arms:
        reference, of = sweep.reference(arm), found[arm.name]
        pairs = [] if reference is None else sorted(losses[arm.name].keys() & losses[reference.name].keys())
        apart = [losses[arm.name][seed] - losses[reference.name][seed] for seed in pairs if reference is not None]
        training, validation = (_mean(of, loss) for loss in ("training", "validation"))
        difference = mean_interval(apart) if apart else None
        rows.append(Row(arm, of, training, validation, reference, difference, arm.name in edges))
    return Results(sweep, runs, judged, rows)


def _losses(results: Mapping[int, Result], loss: Loss) -> dict[int, float]:
    """Returns the losses of the finished runs by seed."""
    return {seed: getattr(result, loss) for seed, result in results.items() if result.state == FINISHED}


def _mean(results: Mapping[int, Result], loss: Loss) -> dict[str, float] | None:
    values = list(_losses(results, loss).values())
    return mean_interval(values) if values and None not in values else None


def _edges(
    sweep: Sweep, found: Mapping[str, Mapping[int, Result]], losses: Mapping[str, Mapping[int, float]]
) -> set[str]:
    """Returns the names of the arms that are the best along the axis of the optimum, and at an end of it.

    An arm is compared with those that differ from it only along this axis. Groups in which a run has not ended are left
    out, and an arm that has failed with a seed cannot be the best.
    """
    if sweep.optimum is None:
        return set()
    groups: dict[str, list[Arm]] = {}
    for arm in sweep.arms:
        groups.setdefault(repr({k: v for k, v in arm.values.items() if k != sweep.optimum}), []).append(arm)
    edges = set()
    for arms in groups.values():
        ended = all(result.state in (FINISHED, FAILED) for arm in arms for result in found[arm.name].values())
        whole = [arm for arm in arms if len(losses[arm.name]) == len(sweep.seeds)]
        if ended and whole:
            best = min(whole, key=lambda arm: sum(losses[arm.name].values()))
            ends = sorted(arm.values[sweep.optimum] for arm in arms)
            if best.values[sweep.optimum] in (ends[0], ends[-1]):
                edges.add(best.name)
    return edges
