# SPDX-License-Identifier: Apache-2.0
"""Environment profiles: the variables of a job, each with its reason, and what the user exported left as it is.

A profile is a file of ``launch/environments``::

    description: what machine this is for
    device: npu                     # npu, cuda or cpu
    device-memory-gib: 64           # of one device; left out: this machine's memory, shared by its processes
    runtime-memory-gib: 3           # what driver, context and allocator take of it
    communicator-buffer: VARIABLE   # which variable says how many MB a communicator holds, twice
    variables:
      NAME: {value: text, reason: one sentence, choices: [...], whole: [least, most]}

``{interface}`` in a value is the job's network interface; without one the variable is left out. ``choices`` and
``whole`` (a whole number in that range) are the legal values, which the preflight holds every exported value against.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...cli import Number, Whole, bounded
from ...files import FileError, Strict, read_yaml, validated
from .job import Cluster
from .job_flags import JobError

DIRECTORY = Path(__file__).parents[1] / "environments"
# torch (seen in 2.13) publishes the address of the store it shares in the first round alone; a node that joins a later
# round waits for it until it times out.
_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def _text(value: Any) -> Any:
    """Values may be written as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_text)]
_Gib = Annotated[float, bounded(Number(0, 1e6))]


class _Variable(Strict):
    value: _Text
    reason: str
    choices: list[_Text] = []
    whole: (
        Annotated[list[Annotated[int, bounded(Whole(-(2**63), 2**63))]], Field(min_length=2, max_length=2)] | None
    ) = None


class _File(Strict):
    description: str = ""
    device: Literal["npu", "cuda", "cpu"]
    device_memory_gib: _Gib | None = Field(None, alias="device-memory-gib")
    runtime_memory_gib: _Gib = Field(0.0, alias="runtime-memory-gib")
    communicator_buffer: str | None = Field(None, alias="communicator-buffer")
    variables: dict[str, _Variable]


@dataclass(frozen=True)
class Variable:
    """One variable of a profile; see the module."""

    name: str
    value: str
    reason: str
    choices: tuple[str, ...] = ()
    whole: tuple[int, int] | None = None

    def mistake(self, value: str) -> str | None:
        """What is wrong with a value, or None."""
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if self.whole is not None:
            try:
                Whole(*self.whole)(value)
            except argparse.ArgumentTypeError:
                return "must be a whole number from {} to {}".format(*self.whole)
        return None


@dataclass(frozen=True)
class Profile:
    """An environment profile; see the module. Memory in GiB."""

    name: str
    device: str
    device_memory_gib: float | None
    runtime_memory_gib: float
    communicator_buffer: str | None
    variables: tuple[Variable, ...]


@dataclass(frozen=True)
class Setting:
    """One variable as the job will see it.

    Attributes:
        name: of the variable.
        value: that the processes see.
        origin: ``profile``, ``job`` (``cluster.environment``), ``launcher`` (what the rendezvous needs), or ``kept``
            (exported before, the others' not taken).
        reason: the profile's, or what is kept in favour of what.
    """

    name: str
    value: str
    origin: str
    reason: str


def names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read_profile(name: str) -> Profile:
    """A profile by name or file.

    Raises:
        JobError: not there, or not of that form.
    """
    path = DIRECTORY / f"{name}.yaml" if name in names() else Path(name)
    try:
        if not path.exists():
            raise FileError(f"{path}: no such file, and no profile of that name: {', '.join(names())}")
        content = validated(_File, read_yaml(path), str(path))
    except (FileError, OSError) as error:
        raise JobError(f"cluster.profile {error}") from None
    variables = (
        Variable(variable, v.value, v.reason, tuple(v.choices), None if v.whole is None else (v.whole[0], v.whole[1]))
        for variable, v in content.variables.items()
    )
    return Profile(
        path.stem,
        content.device,
        content.device_memory_gib,
        content.runtime_memory_gib,
        content.communicator_buffer,
        tuple(variables),
    )


def resolve(profile: Profile, cluster: Cluster, environ: Mapping[str, str], interface: str | None) -> list[Setting]:
    """The variables that the job's processes will see, those of the profile first.

    Args:
        profile: of the job.
        cluster: of the job.
        environ: what is exported now; it wins over the profile unless ``override_environment`` says otherwise.
        interface: the job's network interface, or None.
    """
    settings = []
    for variable in profile.variables:
        origin = "job" if variable.name in cluster.environment else "profile"
        value = cluster.environment.get(variable.name, variable.value)
        reason = "cluster.environment" if origin == "job" else variable.reason
        if variable.name == "CPU_AFFINITY_CONF" and cluster.bind_cores == "numa" and origin == "profile":
            # torch_npu binds late, by card number, and would undo what the wrapper did.
            value, reason = "0", "launch/launcher/bind_cores.py binds by NUMA node instead (cluster.bind-cores numa)."
        if "{interface}" in value:
            if interface is None:
                if variable.name in environ:
                    settings.append(Setting(variable.name, environ[variable.name], "kept", "exported before"))
                continue
            value = value.replace("{interface}", interface)
        settings.append(_against(variable.name, value, origin, reason, cluster, environ))
    if cluster.rendezvous == "c10d" and _SHARED_STORE not in cluster.environment:
        reason = "A store of its own for every round: with a shared one an agent that comes back is told no address."
        settings.append(_against(_SHARED_STORE, "1", "launcher", reason, cluster, environ))
    known = {variable.name for variable in profile.variables}
    for name, value in cluster.environment.items():
        if name not in known:
            settings.append(_against(name, value, "job", "cluster.environment", cluster, environ))
    return settings


def _against(name: str, value: str, origin: str, reason: str, cluster: Cluster, environ: Mapping[str, str]) -> Setting:
    exported = environ.get(name)
    if exported is not None and exported != value and not cluster.override_environment:
        return Setting(name, exported, "kept", f"exported before; the {origin} has {value}")
    return Setting(name, value, origin, reason)


def table(settings: list[Setting]) -> str:
    """One line per variable: what it is set to, by whom, and why."""
    width = max((len(f"{s.name}={s.value}") for s in settings), default=0)
    return "\n".join(f"  {f'{s.name}={s.value}'.ljust(width)}  {s.origin}: {s.reason}" for s in settings)
