# SPDX-License-Identifier: Apache-2.0
"""Sweep files: one YAML file describes which trainings are compared, with which seeds, and with which baseline.

docs/sweeps.md shows a complete one. Flags are those of ``launch/pretrain.py`` without their dashes, with values as in
job files. Every arm is a way to train: one of ``arms``, if there are any, with one value of every flag in ``grid``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

from ...cli import Whole, bounded
from ...files import FileError, Strict, nearest
from ..launcher import packaged
from ..launcher.environment import read_profile
from ..launcher.job import BUILT_IN, Job, JobError, known_flags, read_job, section_of, section_value
from .intervals import MOST_VALUES

ARM: Final = "arm"  # the axis of the named arms; no flag has this name
_MOST_ARMS = 1000
_OPTIMUM_OF = 3  # the least number of values: with fewer, none is between others
_OF_THE_SWEEP = {
    "seed": "seeds: has them",
    "save": "every run has a directory of its own below --output",
    "log-dir": "every run has a directory of its own below --output",
}
# Flags that would end a run early, or resume it as a different training.
_REFUSED = (
    *("load", "exit-interval", "exit-on-missing-checkpoint"),
    *("finetune", "no-load-optim", "no-load-rng", "no-save-optim"),
)
# Keys of the section cluster that make sense on a single machine.
_OF_A_MACHINE = {
    *("profile", "nodes", "devices_per_node", "device_memory_gib", "network_interface", "subnet"),
    *("bind_cores", "environment", "override_environment"),
}


def _is_a_name(text: str) -> str:
    if not 0 < len(text) <= 64 or not text.isprintable() or "|" in text or text != text.strip():
        raise ValueError(f"{text!r} is no name of up to 64 characters that fits into a table")
    return text


_Name = Annotated[str, AfterValidator(_is_a_name)]


class _File(Strict):
    description: str = ""
    base: Any  # the name or the file of a job, or the content of a job file
    arms: dict[_Name, dict[str, Any]] = {}  # flags that each arm sets together, by its name
    grid: dict[str, list[Any]] = {}  # values of each flag
    seeds: list[Annotated[int, bounded(Whole(0, 2**32 - 1))]] = Field(min_length=1, max_length=MOST_VALUES)
    # The name of the arm to compare with; or values of some axes: then each arm is compared with the one that has these
    # values and equals it along all other axes.
    baseline: Any = None
    optimum: str | None = None  # a flag of the grid whose best value should be between others
    last_records: Annotated[int, bounded(Whole(1, 10**6))] = Field(10, alias="last-records")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        values: the values by axis that distinguish the arm from the others.
        flags: the flags that the arm sets, by name without dashes.
    """

    values: Mapping[str, Any]
    flags: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the arm for people."""
        return name_of(self.values)


@dataclass(frozen=True)
class Sweep:
    """A parsed and checked sweep file.

    Attributes:
        base: the job whose flags the arms change.
        arms: the arms in the order of the file.
        baseline: the values of axes that the references of the comparison have, or None.
        optimum: the axis whose best value should not be its least or greatest, or None.
        last_records: the number of records at the end of a log over which the training loss is averaged.
    """

    path: Path
    description: str
    base: Job
    arms: Sequence[Arm]
    seeds: Sequence[int]
    baseline: Mapping[str, Any] | None
    optimum: str | None
    last_records: int

    def reference(self, arm: Arm) -> Arm | None:
        """Returns the arm that ``arm`` is compared with; None if there is no baseline, or ``arm`` is it itself."""
        if self.baseline is None:
            return None
        wanted = {**arm.values, **self.baseline}
        return None if wanted == arm.values else next(other for other in self.arms if other.values == wanted)


def name_of(values: Mapping[str, Any]) -> str:
    """Returns values of axes as a name for people."""
    return ", ".join(v if axis == ARM else f"{axis}={shown(v)}" for axis, v in values.items()) or "base"


def shown(value: Any) -> str:
    """Returns a value of a flag as text for people."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(shown, value)) if isinstance(value, list) else str(value)


def read_sweep(name: str) -> Sweep:
    """Reads a sweep from a file, or by the name of one in ``launch/sweeps``.

    The flags are checked one by one; :func:`~.runs.runs_of` checks those of an arm together.

    Raises:
        FileError: if the file is bad; the message names the file, the key and what is expected.
    """
    path = packaged.files("sweeps").get(name, Path(name))
    file = packaged.load(_File, "sweeps", "sweep", name)
    try:
        arms = _arms(file)
        if len(set(file.seeds)) != len(file.seeds):
            raise FileError(f"seeds: {_twice(file.seeds)} stands there twice")
        baseline = _baseline(file, arms)
        if file.optimum is not None:
            _check_optimum(file.optimum, file.grid)
        base = _base(file.base, path)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return Sweep(path, file.description, base, arms, file.seeds, baseline, file.optimum, file.last_records)


def _base(base: Any, path: Path) -> Job:
    if not isinstance(base, str | dict):
        raise FileError(f"base: expected the name of a job, its file, or what such a file holds, got {base!r}")
    try:
        job = read_job(base) if isinstance(base, str) else read_job(str(path), content=base)
        read_profile(job.cluster.profile)
    except JobError as error:
        raise FileError(f"base: {str(error).removeprefix(f'{path}: ')}") from None
    if job.host.kind != BUILT_IN:
        raise FileError(f"base: host.kind {job.host.kind}: a sweep trains with the built-in host")
    if job.cluster.nodes not in (None, 1):
        raise FileError(f"base: cluster.nodes {job.cluster.nodes}: a sweep runs on the machine that it is started on")
    for key in sorted(job.cluster.model_fields_set - _OF_A_MACHINE):
        raise FileError(f"base: cluster.{key.replace('_', '-')}: a sweep's runs meet nobody elsewhere, leave it out")
    for flag in _REFUSED:
        if job.flags.get(flag, False) is not False:
            raise FileError(
                f"base: {section_of(flag)}.{flag}: a run goes to its end from what it has saved, leave it out"
            )
    return replace(job, path=path, flags={flag: v for flag, v in job.flags.items() if flag not in _OF_THE_SWEEP})


def _arms(file: _File) -> list[Arm]:
    """Returns every named arm with every combination of the grid."""
    named = {
        name: {flag: _value(f"arms.{name}", flag, v) for flag, v in flags.items()} for name, flags in file.arms.items()
    }
    for name, flags in named.items():
        if both := sorted(set(flags) & set(file.grid)):
            raise FileError(f"arms.{name}.{both[0]}: grid has it, too: take it out of one of them")
    for flag, values in file.grid.items():
        if not values:
            raise FileError(f"grid.{flag}: it has no values")
        if (again := _twice([_value("grid", flag, value) for value in values])) is not None:
            raise FileError(f"grid.{flag}: {shown(again)} stands there twice")
    count = max(1, len(named)) * math.prod(map(len, file.grid.values()))
    if count > _MOST_ARMS:
        raise FileError(f"grid: these are {count:,} arms, and {_MOST_ARMS:,} are allowed")
    axes: dict[str, list[Any]] = {**({ARM: list(named)} if named else {}), **file.grid}
    found = []
    for combination in itertools.product(*axes.values()):
        place = dict(zip(axes, combination, strict=True))
        changes = named.get(place.get(ARM, ""), {})
        found.append(Arm(place, {**changes, **{flag: value for flag, value in place.items() if flag != ARM}}))
    return found


def _value(where: str, flag: str, value: Any) -> Any:
    """Checks a flag that an arm sets, and returns its value."""
    if flag in _OF_THE_SWEEP:
        raise FileError(f"{where}.{flag}: {_OF_THE_SWEEP[flag]}")
    if flag in _REFUSED:
        raise FileError(f"{where}.{flag}: a run goes to its end from what it has saved, leave it out")
    section = section_of(flag)
    if section is None:
        raise FileError(f"{where}: unknown flag {flag}{nearest(flag, sorted(known_flags()), otherwise='')}")
    try:
        return section_value(section, flag, value)
    except JobError as error:
        raise FileError(f"{where}: {str(error).removeprefix(f'{section}.')}") from None


def _twice(values: Sequence[Any]) -> Any:
    """Returns the first value that occurs a second time; None if all are different."""
    return next((value for number, value in enumerate(values) if value in values[:number]), None)


def _baseline(file: _File, arms: Sequence[Arm]) -> Mapping[str, Any] | None:
    said = file.baseline
    if said is None:
        return None
    if isinstance(said, str):
        if said in file.arms:
            return {ARM: said}
        found = next((arm for arm in arms if arm.name == said), None)
        if found is None:
            raise FileError(f"baseline: there is no arm {said!r}{nearest(said, [arm.name for arm in arms])}")
        return found.values
    axes = {**({ARM: list(file.arms)} if file.arms else {}), **file.grid}
    if not isinstance(said, dict) or not said:
        raise FileError(f"baseline: expected the name of an arm, or values of the axes, got {said!r}")
    for axis, value in said.items():
        if axis not in axes:
            raise FileError(f"baseline: {axis!r} is no axis of this sweep{nearest(str(axis), list(axes))}")
        if value not in axes[axis]:
            raise FileError(f"baseline.{axis}: {value!r} is none of {', '.join(map(shown, axes[axis]))}")
    return said


def _check_optimum(flag: str, grid: Mapping[str, Sequence[Any]]) -> None:
    if flag not in grid:
        raise FileError(f"optimum: {flag!r} is not in the grid{nearest(flag, list(grid))}")
    numbers = [v for v in grid[flag] if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(grid[flag]) or len(numbers) < _OPTIMUM_OF:
        raise FileError(f"optimum: {flag} needs {_OPTIMUM_OF} numbers at least, of which one lies between the others")
