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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitcpm_megatron.launch.job import Cluster, JobError

DIRECTORY = Path(__file__).parent / "environments"
_KEYS = {"description", "device", "device-memory-gib", "runtime-memory-gib", "communicator-buffer", "variables"}
# torch (seen in 2.13) publishes the address of the store it shares in the first round alone; a node that joins a later
# round waits for it until it times out.
_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_VARIABLE_KEYS = {"value", "reason", "choices", "whole"}


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
            low, high = self.whole
            if not value.isdigit() or not low <= int(value) <= high:
                return f"must be a whole number from {low} to {high}"
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
    if not path.is_file():
        raise JobError(f"cluster.profile {name}: no such file, and no profile of that name: {', '.join(names())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"cluster.profile {path}: {error}") from None
    try:
        return _profile(path.stem, content)
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(f"cluster.profile {path}: not an environment profile ({error})") from None


def _profile(name: str, content: Any) -> Profile:
    if not isinstance(content, dict) or set(content) - _KEYS:
        raise ValueError(f"expected a mapping with {sorted(_KEYS)}")
    variables = []
    for variable, entry in content["variables"].items():
        if set(entry) - _VARIABLE_KEYS:
            raise ValueError(f"{variable}: unknown keys {sorted(set(entry) - _VARIABLE_KEYS)}")
        whole = entry.get("whole")
        variables.append(
            Variable(
                variable,
                str(entry["value"]),
                str(entry["reason"]),
                tuple(map(str, entry.get("choices", ()))),
                None if whole is None else (int(whole[0]), int(whole[1])),
            )
        )
    memory = content.get("device-memory-gib")
    return Profile(
        name,
        str(content["device"]),
        None if memory is None else float(memory),
        float(content.get("runtime-memory-gib", 0)),
        content.get("communicator-buffer"),
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
            value, reason = "0", "launch/bind_cores.py binds by NUMA node instead (cluster.bind-cores numa)."
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
