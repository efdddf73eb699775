# SPDX-License-Identifier: Apache-2.0
"""Job files: one YAML file describes what is trained, how it is laid out, and on which machines.

docs/cluster.md shows a complete one. The keys of the sections ``model`` to ``ternary`` are the flags of the built-in
loop without their dashes, under the headings of ``launch/pretrain.py --help``; ``preset`` is ``--model``. A switch
takes ``true`` (``false`` leaves it out). An unknown key is an error that names the nearest known one; a value of the
wrong type is an error, too. Nothing in the file is expanded or passed to a shell. A file with ``stages`` is a job that
trains in several stages, each a :class:`Job` of its own (``stages.py``).
"""

import argparse
import functools
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ...cli import Number, Whole, bounded
from ...files import FileError, Strict, nearest, parse_yaml, read_yaml, validated
from ...training.flags import build_parser
from . import packaged, presets, stages

BUILT_IN: Final = "built-in"
MEGATRON_LM: Final = "megatron-lm"
_SECTIONS = ("model", "parallelism", "training", "data", "checkpoint", "distillation", "logging", "ternary")


class JobError(FileError):
    """The error that a job file, or an override of it, does not exist or cannot be understood."""


@functools.cache
def known_flags() -> dict[str, tuple[str, argparse.Action]]:
    """Returns the section and the argparse action of each flag of the built-in loop, by its name without dashes."""
    return {
        action.option_strings[0].removeprefix("--"): (str(group.title), action)
        for group in build_parser()._action_groups
        if group.title in _SECTIONS
        for action in group._group_actions
    }


def section_of(flag: str) -> str | None:
    """Returns the section that a flag of the built-in loop belongs to; None for a flag that the loop does not have."""
    return known_flags()[flag][0] if flag in known_flags() else None


def section_value(section: str, key: Any, value: Any) -> Any:
    """Returns the value of a key of a section, after checking it; a single value of a list flag becomes a list.

    Raises:
        JobError: if there is no such flag, or the value is not legal for it.
    """
    where, home = f"{section}.{key}", section_of(key)
    if home != section:
        known = sorted(flag for flag, (of, _) in known_flags().items() if of == section)
        hint = f": it belongs to section {home}" if home else nearest(str(key), known)
        raise JobError(f"unknown key {where}{hint}")
    action = known_flags()[key][1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise JobError(f"{where}: expected true or false, got {value!r}")
        return value
    if action.nargs == "+" and not isinstance(value, list):
        value = [value]
    for item in value if action.nargs == "+" else [value]:
        if isinstance(action.type, Whole | Number):
            if mistake := action.type.mistake(item):
                raise JobError(f"{where}: {item!r}: {mistake}")
        elif isinstance(item, bool) or not isinstance(item, str | int | float):
            raise JobError(f"{where}: expected text, got {item!r}")
        if action.choices is not None and item not in action.choices:
            raise JobError(f"{where}: {item!r} is none of {', '.join(map(str, action.choices))}")
        if presets.reads_as_flag(item):
            raise JobError(f"{where}: {item!r} would be taken for a flag")
    return value


def _reads(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
        return True
    except ValueError:
        return False


def is_host_name(text: str) -> bool:
    """Returns whether a text is an IP address or a legal host name (RFC 1123, underscores tolerated)."""
    labels = text.split(".")
    name = 0 < len(text) <= 253 and all(re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", label) for label in labels)
    return name or _reads(ipaddress.ip_address, text)


def _checked(good: str | Callable[[str], bool], otherwise: str) -> AfterValidator:
    """Returns a validator that refuses texts that are not ``good`` (a pattern or a test); ``otherwise`` says why."""

    def check(text: str) -> str:
        if not (re.fullmatch(good, text) if isinstance(good, str) else good(text)):
            raise ValueError(f"{text!r} is {otherwise}")
        return text

    return AfterValidator(check)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "\0" in str(value):
        raise ValueError(f"expected text or a number, got {value!r}")
    return str(value)


# The value of an environment variable; the file may give it as a number.
Text = Annotated[str, BeforeValidator(_text)]
_VariableName = Annotated[str, _checked(r"[A-Za-z_][A-Za-z0-9_]*", "no name of a variable")]
_HostName = Annotated[str, _checked(is_host_name, "no legal host name or address")]
# Flags of the built-in loop for which other hosts know more values.
_OF_HOSTS = ("tokenizer-type", "cp-comm-type")
_Name = Annotated[str, _checked(r"[A-Za-z0-9._-]{1,128}", "not a name of letters, digits, . _ -")]
_Interface = Annotated[str, _checked(r"[A-Za-z0-9._:@-]{1,15}", "not the name of an interface")]
_is_subnet = functools.partial(_reads, ipaddress.ip_network)
_Subnet = Annotated[str, _checked(_is_subnet, "no address range such as 10.0.0.0/16 (host bits must be 0)")]


class _Section(Strict):
    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"), validate_by_name=True)


class Host(_Section):
    """The training loop that runs the job."""

    kind: Literal["built-in", "megatron-lm"] = BUILT_IN  # launch/pretrain.py or launch/pretrain_gpt.py
    megatron_path: str | None = None  # checkout of Megatron-LM, core_v0.12.1 or newer
    mindspeed_path: str | None = None  # checkout of MindSpeed; left out on CUDA
    flags: dict[str, presets.FlagValue] = {}  # flags that only this host knows, passed on unchanged

    @field_validator("flags")
    @classmethod
    def _flags(cls, flags: dict[str, Any]) -> dict[str, Any]:
        for key in flags:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
                raise ValueError(f"{key!r} is no name of a flag (write it without dashes in front)")
            if section_of(key) is not None and key not in _OF_HOSTS:
                raise ValueError(f"{key}: it belongs to section {section_of(key)}")
        return flags

    @model_validator(mode="after")
    def _of_the_kind(self) -> "Host":
        idle = [key for key in ("megatron_path", "mindspeed_path", "flags") if getattr(self, key)]
        if self.kind == BUILT_IN and idle:
            keys = ", ".join(key.replace("_", "-") for key in idle)
            raise ValueError(f"{keys}: only the {MEGATRON_LM} host has use for it")
        if self.kind == MEGATRON_LM and self.megatron_path is None:
            raise ValueError(f"megatron-path: the {MEGATRON_LM} host needs the path of a Megatron-LM checkout")
        return self


class Cluster(_Section):
    """The machines on which a job runs, and how its processes meet; docs/cluster.md has a table of the keys."""

    profile: str = "cpu"  # environment profile: a name in launch/environments or a file of that format
    # The source that tells which node this is; "auto" detects it.
    scheduler: Literal["auto", "single", "hosts", "slurm", "kubernetes", "modelarts"] = "auto"
    nodes: Annotated[int, bounded(Whole(1, 2**16))] | None = None  # None: as the scheduler says (1 without one)
    devices_per_node: Annotated[int, bounded(Whole(1, 1024))] = 1  # processes, one per device
    device_memory_gib: Annotated[float, bounded(Number(0, 1e6, open_minimum=True))] | None = None  # None: the profile's
    # Names or addresses of the machines in rank order, for plain ssh; the first one is the master.
    hosts: Annotated[tuple[_HostName, ...], Field(strict=False)] = ()
    master_addr: _HostName | None = None  # address of node 0; None for the first host that the scheduler names
    master_port: Annotated[int, bounded(Whole(1, 65535))] = 29500
    rendezvous: Literal["static", "c10d"] = "static"  # fixed node ranks, or elastic: a node may come back
    rendezvous_id: _Name | None = None  # name of the job at a c10d rendezvous; None for the job file's name
    rendezvous_timeout: Annotated[int, bounded(Whole(1, 10**7))] = 900  # seconds that the nodes wait for each other
    keep_alive_seconds: Annotated[int, bounded(Whole(3, 10**6))] = 15  # c10d: silence after which a node is dead
    max_restarts: Annotated[int, bounded(Whole(0, 10**6))] = 0  # restarts of this node's workers after failures
    # The NIC for HCCL / NCCL and gloo: by name, or by a range (CIDR) in which it has an address.
    network_interface: _Interface | None = None
    subnet: _Subnet | None = None
    bind_cores: Literal["none", "numa"] = "none"  # by the profile's variables, or bind_cores.py
    environment: dict[_VariableName, Text] = {}  # variables that replace the profile's
    override_environment: bool = False  # whether the profile replaces exported variables

    @model_validator(mode="after")
    def _one_interface(self) -> "Cluster":
        if self.network_interface and self.subnet:
            raise ValueError("network-interface and subnet say the same: give one")
        return self


class _Flags(Strict):
    model: dict[str, Any] = {}
    parallelism: dict[str, Any] = {}
    training: dict[str, Any] = {}
    data: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}
    distillation: dict[str, Any] = {}
    logging: dict[str, Any] = {}
    ternary: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, str | None], dict[str, Any]]:
        """Returns the preset, if one is named (a dict with at most one entry), and the flags."""
        preset = {"preset": self.model["preset"]} if "preset" in self.model else {}
        if not all(isinstance(name, str | None) for name in preset.values()):
            raise JobError("model.preset: expected the name of a preset, or a file")
        return preset, {
            key: section_value(section, key, value)
            for section in _SECTIONS
            for key, value in getattr(self, section).items()
            if (section, key) != ("model", "preset")
        }


class _File(_Flags):
    description: str = ""
    host: Host = Host()
    cluster: Cluster = Cluster()
    stages: list[dict[Any, Any]] = []  # each has a name and, by section, what it changes


class _Stage(_Flags):
    # A directory has this name, too.
    name: Annotated[str, _checked(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "not a name of letters, digits, . _ -")]


@dataclass(frozen=True)
class Job:
    """A parsed and checked job file, or one of its stages."""

    name: str  # stem of the file, with the size if it has several, and the stage
    path: Path
    description: str
    host: Host
    preset: str | None  # name or file of the preset
    flags: Mapping[str, Any]  # values of the flags, by name without dashes, in the order of the file
    cluster: Cluster
    stage: str | None = None  # name of the stage; None for a job that has no stages
    before: "Job | None" = None  # the preceding stage

    @property
    def number(self) -> int:
        """The number of the stage, from 0."""
        return 0 if self.before is None else self.before.number + 1

    def arguments(self) -> argparse.Namespace:
        """Parses the preset and the flags with the built-in loop's parser; dependent defaults are not filled in.

        Raises:
            JobError: if something required is missing, or the parser refuses a value.
            PresetError: if the preset does not exist or cannot be understood.
        """
        where = str(self.path) if self.stage is None else f"{self.path}: stage {self.stage}"
        where += f" with the preset {self.preset}" if self.preset else ""
        argv = [*(presets.flags(self.preset) if self.preset else []), *presets.arguments(self.flags)]
        return presets.parsed(argv, lambda message: JobError(f"{where}: {message}"))

    def vocab_size(self) -> int | None:
        """Returns the unpadded vocabulary size by ``data.vocab-size`` or else the preset; None if neither gives it."""
        if "vocab-size" in self.flags:
            return int(self.flags["vocab-size"])
        return presets.read(self.preset).vocab_size if self.preset else None


def names() -> list[str]:
    """Returns the names of the jobs in the package: one per file, or one per size of a file with several."""
    return sorted(name for path in packaged.files("jobs").values() for name in _jobs_in(path))


def _jobs_in(path: Path) -> dict[str, str | None]:
    """Returns the names of the jobs in a file, each with its size (None for a file without sizes)."""
    sizes = read_yaml(path).get("sizes", ())
    return {f"{path.stem}-{size}": size for size in sizes} or {path.stem: None}


def _find(name: str) -> tuple[Path, str | None]:
    """Returns the file of a job and the chosen size."""
    for stem, path in packaged.files("jobs").items():
        if name.startswith(stem) and name in (jobs := _jobs_in(path)):
            return path, jobs[name]
    path, size = Path(name), None
    if not path.exists() and ":" in path.name:
        path, size = Path(name.rpartition(":")[0]), name.rpartition(":")[2]
    if not path.is_file():
        raise packaged.missing(name, "job", names())
    return path, size


def read_job(name: str, overrides: Sequence[str] = (), content: Any = None) -> Job:
    """Reads a job that has no stages, as :func:`read_stages` does.

    Raises:
        JobError: if :func:`read_stages` raises it, or the job has stages.
    """
    jobs = read_stages(name, overrides, content)
    if jobs[0].stage is not None:
        raise JobError(
            f"{jobs[0].path}: it has stages ({', '.join(str(job.stage) for job in jobs)}), and is not one job"
        )
    return jobs[0]


def read_stages(name: str, overrides: Sequence[str] = (), content: Any = None) -> list[Job]:
    """Reads a job and its stages from a file, or by the name of a job that comes with the package.

    Args:
        name: a file, ``FILE:SIZE`` if the file has sizes, or the name of a job.
        overrides: changes of the form ``section.key=value`` (``cluster.nodes=2``, ``host.flags.use-flash-attn=true``),
            values in YAML; an empty value removes a key or a section. ``stages.NAME.section.key=value``: one stage.
        content: the content of the job if it is part of a file of another kind, whose path is then the name.

    Returns:
        The stages of the job in their order; for a job without stages, only the job itself.

    Raises:
        JobError: if the job is bad; the message names the file, the stage, the key and what is expected.
    """
    try:
        path, size = _find(name) if content is None else (Path(name), None)
        content = read_yaml(path) if content is None else content
    except FileError as error:
        raise JobError(str(error)) from None
    try:
        if isinstance(content, dict):
            _choose_size(content, size)
            for override in overrides:
                _override(content, override)
        file = validated(_File, content, "the job")
        preset, flags = file.read()
        job_name = path.stem if size is None else f"{path.stem}-{size}"
        job = Job(job_name, path, file.description, file.host, preset.get("preset"), flags, file.cluster)
        return _stages(job, file.stages) or [job]
    except FileError as error:
        raise JobError(f"{path}: {str(error).removeprefix('the job: ')}") from None


def _stages(job: Job, entries: Sequence[dict[Any, Any]]) -> list[Job]:
    """Builds the stages of a job from the job without stages and the entries of the stages in the file."""
    found: list[Job] = []
    for number, entry in enumerate(entries, 1):
        of = f"stage {entry.get('name', number)}"
        stage = validated(_Stage, entry, of)
        try:
            preset, own = stage.read()
            flags = stages.flags_of(stage.name, job.flags, own, {str(j.stage): j.flags for j in found})
        except FileError as error:
            raise JobError(f"{of}: {error}") from None
        # A rendezvous of its own for each stage, so that agents of different stages never meet.
        named = {"rendezvous_id": f"{job.cluster.rendezvous_id or job.name}-{stage.name}"}
        found.append(
            replace(
                job,
                name=f"{job.name}-{stage.name}",
                preset=preset.get("preset", job.preset),
                flags=flags,
                cluster=job.cluster.model_copy(update=named),
                stage=stage.name,
                before=found[-1] if found else None,
            )
        )
    return found


def _choose_size(content: dict[Any, Any], size: str | None) -> None:
    """Applies the changes of a size to the content of a job file, and removes ``sizes`` from it."""
    sizes = content.pop("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(changes, dict) for changes in sizes.values()):
        raise JobError("sizes: expected names of sizes, and for each the entries that it changes, by section")
    if size is None and sizes:
        raise JobError(f"it has sizes ({', '.join(map(str, sizes))}): name one, as FILE:{next(iter(sizes))}")
    if size is not None and size not in sizes:
        raise JobError(f"it has no size {size!r}{nearest(size, list(map(str, sizes)))}")
    for section, changes in sizes.get(size, {}).items():
        both = isinstance(changes, dict) and isinstance(content.get(section), dict)
        content[section] = {**content[section], **changes} if both else changes


def _override(content: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise JobError(f"--set {override}: write section.key=value")
    if own := stages.that_say(content, parts):
        raise JobError(f"--set {override}: stages have their own ({', '.join(own)}): write stages.{own[0]}.{key}=...")
    value, target = parse_yaml(text, f"--set {key}"), content
    for part in parts[:-1]:
        target = stages.named(target, part) if isinstance(target, list) else target.setdefault(part, {})
        if not isinstance(target, dict) and part != "stages":
            raise JobError(f"--set {override}: {part} is no section")
    if not isinstance(target, dict):
        raise JobError(f"--set {override}: write stages.NAME.section.key=value")
    if value is None:
        target.pop(parts[-1], None)
    else:
        target[parts[-1]] = value
