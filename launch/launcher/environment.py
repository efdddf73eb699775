# SPDX-License-Identifier: Apache-2.0
"""Environment profiles: the variables of a job, each with its reason, and what the user exported left as it is.

The profiles stand in ``launch/environments``. ``{interface}`` in a value is the job's network interface; without one
the variable is left out.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ...cli import Number, Whole, bounded
from ...files import FileError, Strict
from . import packaged
from .job import Cluster, JobError, Text

# torch (seen in 2.13) publishes the address of the store it shares in the first round alone; a node that joins a later
# round waits for it until it times out.
_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


_Gib = Annotated[float, bounded(Number(0, 1e6))]


class Variable(Strict):
    """One variable of a profile, and its legal values, which the preflight holds every exported value against."""

    value: Text
    reason: str  # one sentence
    choices: list[Text] = []
    whole: Annotated[tuple[int, int], Field(strict=False)] | None = None  # a whole number from least to most

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


class Profile(Strict):
    """An environment profile."""

    description: str = ""  # what machine this is for
    device: Literal["npu", "cuda", "cpu"]
    # Of one device; left out: this machine's memory, shared by its processes.
    device_memory_gib: _Gib | None = Field(None, alias="device-memory-gib")
    # What driver, context and allocator take of it.
    runtime_memory_gib: _Gib = Field(0.0, alias="runtime-memory-gib")
    # Which variable says how many MB a communicator holds, twice.
    communicator_buffer: str | None = Field(None, alias="communicator-buffer")
    variables: dict[str, Variable]  # by name


@dataclass(frozen=True)
class Setting:
    """One variable as the job will see it."""

    name: str
    value: str
    # profile, job (cluster.environment), launcher (what the rendezvous needs), or kept: what was exported before
    origin: str
    reason: str  # the profile's, or what is kept in favour of what


def read_profile(name: str) -> Profile:
    """A profile by name or file.

    Raises:
        JobError: not there, or not of that form.
    """
    try:
        return packaged.load(Profile, "environments", "profile", name)
    except FileError as error:
        raise JobError(f"cluster.profile {error}") from None


def resolve(profile: Profile, cluster: Cluster, environ: Mapping[str, str], interface: str | None) -> list[Setting]:
    """The variables that the job's processes will see, those of the profile first.

    What is exported now (``environ``) wins over all others unless ``cluster.override_environment``.
    """
    wanted = {name: Setting(name, v.value, "profile", v.reason) for name, v in profile.variables.items()}
    if "CPU_AFFINITY_CONF" in wanted and cluster.bind_cores == "numa":
        # torch_npu binds late, by card number, and would undo what the wrapper did.
        reason = "launch/launcher/bind_cores.py binds by NUMA node instead (cluster.bind-cores numa)."
        wanted["CPU_AFFINITY_CONF"] = Setting("CPU_AFFINITY_CONF", "0", "profile", reason)
    if cluster.rendezvous == "c10d" and _SHARED_STORE not in cluster.environment:
        reason = "A store of its own for every round: with a shared one an agent that comes back is told no address."
        wanted[_SHARED_STORE] = Setting(_SHARED_STORE, "1", "launcher", reason)
    wanted |= {name: Setting(name, v, "job", "cluster.environment") for name, v in cluster.environment.items()}
    settings = []
    for name, setting in wanted.items():
        value, exported = setting.value, environ.get(name)
        if "{interface}" in value and name in profile.variables:
            if interface is None:
                if exported is not None:
                    settings.append(Setting(name, exported, "kept", "exported before"))
                continue
            value = value.replace("{interface}", interface)
        if exported not in (None, value) and not cluster.override_environment:
            settings.append(Setting(name, str(exported), "kept", f"exported before; the {setting.origin} has {value}"))
        else:
            settings.append(Setting(name, value, setting.origin, setting.reason))
    return settings


def table(settings: list[Setting]) -> str:
    """One line per variable: what it is set to, by whom, and why."""
    width = max((len(f"{s.name}={s.value}") for s in settings), default=0)
    return "\n".join(f"  {f'{s.name}={s.value}'.ljust(width)}  {s.origin}: {s.reason}" for s in settings)
