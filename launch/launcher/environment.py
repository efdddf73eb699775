# SPDX-License-Identifier: Apache-2.0
"""Environment profiles: the environment variables of a job, each with its reason; exported variables keep their values.

The profiles are in ``launch/environments``. ``{interface}`` in a value stands for the job's network interface; without
one the variable is left out.
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

# torch (seen in 2.13) publishes the address of the shared store only in the first round; a node that joins in a later
# round waits for the address until it times out.
_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


_Gib = Annotated[float, bounded(Number(0, 1e6))]


class Variable(Strict):
    """A variable of a profile, with its legal values, against which the preflight checks every exported value."""

    value: Text
    reason: str  # why the variable has this value, in one sentence
    choices: list[Text] = []
    whole: Annotated[tuple[int, int], Field(strict=False)] | None = None  # bounds of a whole number: least, most

    def mistake(self, value: str) -> str | None:
        """Returns what is wrong with a value, or None."""
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if self.whole is not None:
            try:
                Whole(*self.whole)(value)
            except argparse.ArgumentTypeError:
                return "must be a whole number from {} to {}".format(*self.whole)
        return None


class Profile(Strict):
    """An environment profile: a kind of device, its memory, and the environment variables that it needs."""

    description: str = ""  # the kind of machine that the profile is for
    device: Literal["npu", "cuda", "cpu"]
    # Memory of one device in GiB; if left out, the memory of this machine, divided by its processes.
    device_memory_gib: _Gib | None = Field(None, alias="device-memory-gib")
    # The part of it that driver, context and allocator take.
    runtime_memory_gib: _Gib = Field(0.0, alias="runtime-memory-gib")
    # Name of the variable with the size in MB of a communicator's buffer; each communicator holds two.
    communicator_buffer: str | None = Field(None, alias="communicator-buffer")
    variables: dict[str, Variable]  # the variables by name


@dataclass(frozen=True)
class Setting:
    """An environment variable as the job will see it."""

    name: str
    value: str
    # "profile", "job" (cluster.environment), "launcher" (needed by the rendezvous), or "kept" (exported before)
    origin: str
    reason: str  # the reason given by the origin, or which value was kept instead of which


def read_profile(name: str) -> Profile:
    """Reads a profile by its name or its file.

    Raises:
        JobError: if it does not exist, or does not have the format of a profile.
    """
    try:
        return packaged.load(Profile, "environments", "profile", name)
    except FileError as error:
        raise JobError(f"cluster.profile {error}") from None


def resolve(profile: Profile, cluster: Cluster, environ: Mapping[str, str], interface: str | None) -> list[Setting]:
    """Returns the variables that the job's processes will see, those of the profile first.

    Exported values (``environ``) override all others unless ``cluster.override_environment`` is set.
    """
    wanted = {name: Setting(name, v.value, "profile", v.reason) for name, v in profile.variables.items()}
    if "CPU_AFFINITY_CONF" in wanted and cluster.bind_cores == "numa":
        # torch_npu binds late, by card number, and would undo the binding of the wrapper.
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
    """Returns the settings as text, one line per variable: its value, who set it, and why."""
    width = max((len(f"{s.name}={s.value}") for s in settings), default=0)
    return "\n".join(f"  {f'{s.name}={s.value}'.ljust(width)}  {s.origin}: {s.reason}" for s in settings)
