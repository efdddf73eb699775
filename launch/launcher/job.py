# SPDX-License-Identifier: Apache-2.0
"""Job files: one YAML file says what is trained, how it is laid out, and on which machines.

::

    description: one line for the people who meet this file
    host:                                     # which training loop runs; left out: our own
      kind: megatron-lm                       # built-in (launch/pretrain.py) or megatron-lm (launch/pretrain_gpt.py)
      megatron-path: /opt/Megatron-LM         # checkout of Megatron-LM, core_v0.12.1 or newer
      mindspeed-path: /opt/MindSpeed          # checkout of MindSpeed; left out on CUDA
      flags: {use-flash-attn: true}           # flags that only this host knows, as they are
    model: {preset: minicpm4-8b, seq-length: 4096}
    parallelism: {tensor-model-parallel-size: 2, sequence-parallel: true}
    training: {micro-batch-size: 1, global-batch-size: 256, train-iters: 50000, lr: 3.0e-4, bf16: true}
    data: {data-path: [/data/corpus_text_document], tokenizer-model: /data/tokenizer.model}
    ternary: {ternary: true, ternary-group-size: -1}
    checkpoint: {save: /checkpoints/8b, save-interval: 500}
    logging: {log-interval: 10}
    cluster: {profile: ascend910b, nodes: 2, devices-per-node: 8, hosts: [node-a, node-b], subnet: 10.0.0.0/16}
    sizes:                                    # one file for several jobs; each changes what it names, by section
      16npu: {cluster: {nodes: 2}}            # started as FILE:16npu

The keys of ``model`` to ``logging`` are the flags of ``launch/pretrain.py --help`` without their dashes, under the
heading that the help gives them; ``preset`` is ``--model``. A switch takes ``true`` (``false`` leaves it out). The keys
of ``cluster`` are the fields of :class:`Cluster`. An unknown key is an error that names the nearest known one; so is a
value of the wrong type. Nothing is expanded, and nothing in the file is ever seen by a shell.
"""

import argparse
import functools
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ...cli import Number, Whole, bounded
from ...files import FileError, Strict, nearest, parse_yaml, read_yaml, validated
from ...training.flags import build_parser
from . import presets
from .job_flags import SECTIONS, JobError, flag_value, refuse_flags_in, section_of

DIRECTORY = Path(__file__).parents[1] / "jobs"
BUILT_IN: Final = "built-in"
MEGATRON_LM: Final = "megatron-lm"
_FLAG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def is_host_name(text: str) -> bool:
    """Whether a text is an IP address or a legal host name (RFC 1123, underscores tolerated)."""
    try:
        ipaddress.ip_address(text)
        return True
    except ValueError:
        return 0 < len(text) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in text.split("."))


def _host_name(text: str) -> str:
    if not is_host_name(text):
        raise ValueError(f"{text!r} is no legal host name or address")
    return text


def _rendezvous_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", text):
        raise ValueError(f"{text!r} is not a name of letters, digits, . _ -")
    return text


def _interface(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:@-]{1,15}", text):
        raise ValueError(f"{text!r} is not the name of an interface")
    return text


def _subnet(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is no address range such as 10.0.0.0/16 (host bits must be 0)") from None
    return text


def _variables(content: Any) -> Any:
    """Values of variables may be written as numbers."""
    if not isinstance(content, dict):
        return content
    for name, value in content.items():
        if not isinstance(name, str) or not _ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable")
        if isinstance(value, bool) or not isinstance(value, str | int | float) or "\0" in str(value):
            raise ValueError(f"{name}: expected text or a number, got {value!r}")
    return {name: str(value) for name, value in content.items()}


class _Section(Strict):
    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"), validate_by_name=True)


class Host(_Section):
    """The training loop that runs; see the module."""

    kind: Literal["built-in", "megatron-lm"] = BUILT_IN
    megatron_path: str | None = None
    mindspeed_path: str | None = None
    flags: dict[str, Any] = {}

    @field_validator("flags")
    @classmethod
    def _flags(cls, flags: dict[str, Any]) -> dict[str, Any]:
        for key, value in flags.items():
            if not _FLAG_NAME.fullmatch(key):
                raise ValueError(f"{key!r} is no name of a flag (write it without dashes in front)")
            if section_of(key) is not None:
                raise ValueError(f"{key}: it belongs to section {section_of(key)}")
            items = value if isinstance(value, list) else [value]
            if not items or any(isinstance(item, dict | list) or item is None for item in items):
                raise ValueError(f"{key}: expected true, a value or a list of values, got {value!r}")
            for item in items:
                refuse_flags_in(key, item)
        mistake = Whole(1, 2**16).mistake(flags.get("context-parallel-size", 1))
        if mistake is not None:
            raise ValueError(f"context-parallel-size: {flags['context-parallel-size']!r}: {mistake}")
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
    """Where a job runs.

    Attributes:
        profile: environment profile, a name in ``launch/environments`` or a file of that form.
        scheduler: who says which node this is; ``auto`` looks for what is there.
        nodes: machines; None for what the scheduler says (1 without one).
        devices_per_node: processes per machine, one per device.
        device_memory_gib: memory of one device in GiB; None for the profile's.
        hosts: names or addresses of the machines in rank order, for plain ssh; the first one is the master.
        master_addr: None for the first host that the scheduler names.
        master_port: TCP port of the rendezvous.
        rendezvous: ``static`` (fixed node ranks) or ``c10d`` (elastic: a node may come back).
        rendezvous_id: names the job at a ``c10d`` rendezvous; None for the job file's name.
        rendezvous_timeout: seconds that the nodes wait for each other.
        keep_alive_seconds: after this long without a sign of life a node counts as dead (``c10d``).
        max_restarts: how often the workers of this node are started again after a failure.
        network_interface: NIC for HCCL / NCCL and gloo, by name.
        subnet: the same by an address range (CIDR): the NIC that has an address in it.
        bind_cores: ``none`` (the profile's variables decide) or ``numa`` (``launch/launcher/bind_cores.py``).
        environment: variables that replace the profile's.
        override_environment: whether the profile replaces what is exported already.
    """

    profile: str = "cpu"
    scheduler: Literal["auto", "single", "hosts", "slurm", "kubernetes", "modelarts"] = "auto"
    nodes: Annotated[int, bounded(Whole(1, 2**16))] | None = None
    devices_per_node: Annotated[int, bounded(Whole(1, 1024))] = 1
    device_memory_gib: Annotated[float, bounded(Number(0, 1e6, open_minimum=True))] | None = None
    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host_name)], ...], Field(strict=False)] = ()
    master_addr: Annotated[str, AfterValidator(_host_name)] | None = None
    master_port: Annotated[int, bounded(Whole(1, 65535))] = 29500
    rendezvous: Literal["static", "c10d"] = "static"
    rendezvous_id: Annotated[str, AfterValidator(_rendezvous_id)] | None = None
    rendezvous_timeout: Annotated[int, bounded(Whole(1, 10**7))] = 900
    keep_alive_seconds: Annotated[int, bounded(Whole(3, 10**6))] = 15
    max_restarts: Annotated[int, bounded(Whole(0, 10**6))] = 0
    network_interface: Annotated[str, AfterValidator(_interface)] | None = None
    subnet: Annotated[str, AfterValidator(_subnet)] | None = None
    bind_cores: Literal["none", "numa"] = "none"
    environment: Annotated[dict[str, str], BeforeValidator(_variables)] = {}
    override_environment: bool = False

    @model_validator(mode="after")
    def _one_interface(self) -> "Cluster":
        if self.network_interface and self.subnet:
            raise ValueError("network-interface and subnet say the same: give one")
        return self


class _File(Strict):
    description: str = ""
    host: Host = Host()
    model: dict[str, Any] = {}
    parallelism: dict[str, Any] = {}
    training: dict[str, Any] = {}
    data: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}
    logging: dict[str, Any] = {}
    ternary: dict[str, Any] = {}
    cluster: Cluster = Cluster()


@dataclass(frozen=True)
class Job:
    """A job file, understood.

    Attributes:
        name: stem of the file, with the size where it has several.
        path: the file.
        description: one line.
        host: the training loop.
        preset: model preset by name or file, or None.
        flags: what the sections say, by flag name without dashes, in the file's order.
        cluster: where it runs.
    """

    name: str
    path: Path
    description: str
    host: Host
    preset: str | None
    flags: Mapping[str, Any]
    cluster: Cluster

    def argv(self) -> list[str]:
        """Flags of the job, without the preset's and without the host's own."""
        return [part for flag, value in self.flags.items() for part in as_argv(flag, value)]

    def arguments(self) -> argparse.Namespace:
        """What our parser makes of preset and flags, dependent defaults not filled in.

        Raises:
            JobError: something required is missing, or the parser refuses a value.
            PresetError: the preset is not there, or not understood.
        """

        def refuse(message: str) -> NoReturn:
            preset = f" with the preset {self.preset}" if self.preset else ""
            raise JobError(f"{self.path}{preset}: {message}")

        parser = build_parser()
        parser.error = refuse  # type: ignore[method-assign]
        return parser.parse_args([*(presets.flags(self.preset) if self.preset else []), *self.argv()])

    def vocab_size(self) -> int | None:
        """Tokens without padding, by ``data.vocab-size`` or else by the preset; None where neither says."""
        if "vocab-size" in self.flags:
            return int(self.flags["vocab-size"])
        return presets.read(self.preset).vocab_size if self.preset else None


def names() -> list[str]:
    """The jobs that come with the package: every file, or each size of one that has several."""
    return sorted(_packaged())


@functools.cache
def _packaged() -> dict[str, tuple[Path, str | None]]:
    found: dict[str, tuple[Path, str | None]] = {}
    for path in DIRECTORY.glob("*.yaml"):
        sizes: list[str | None] = list(read_yaml(path).get("sizes", ())) or [None]
        found |= {path.stem if size is None else f"{path.stem}-{size}": (path, size) for size in sizes}
    return found


def read_job(name: str, overrides: Sequence[str] = ()) -> Job:
    """Reads a job by file, or by the name of one that comes with the package.

    Args:
        name: file, ``FILE:SIZE`` where the file has sizes, or name.
        overrides: ``section.key=value`` (``cluster.nodes=2``, ``host.flags.use-flash-attn=true``), values in YAML; an
            empty value takes the key out, or a whole section.

    Raises:
        JobError: naming the file, the key and what is expected.
    """
    path, size = _packaged().get(name, (Path(name), None))
    if not path.exists() and ":" in path.name:
        path, size = Path(name.rpartition(":")[0]), name.rpartition(":")[2]
    if not path.is_file():
        raise JobError(f"{name}: no such job file, and no job of that name: choose one of {', '.join(names())}")
    try:
        content = read_yaml(path)
        if isinstance(content, dict):
            _choose_size(content, size)
            for override in overrides:
                _override(content, override)
        job_name = path.stem if size is None else f"{path.stem}-{size}"
        return _job(job_name, path, validated(_File, content, "the job"))
    except JobError as error:
        raise JobError(f"{path}: {error}") from None
    except FileError as error:
        raise JobError(str(error).replace("the job:", f"{path}:", 1)) from None


def as_argv(flag: str, value: Any) -> list[str]:
    """A flag and its value as a command line has them; a switch that is false is left out."""
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def _job(name: str, path: Path, content: _File) -> Job:
    flags: dict[str, Any] = {}
    preset = content.model.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise JobError("model.preset: expected the name of a preset, or a file")
    for section in SECTIONS:
        for key, value in getattr(content, section).items():
            if (section, key) != ("model", "preset"):
                flags[key] = flag_value(section, key, value)
    return Job(name, path, content.description, content.host, preset, flags, content.cluster)


def _choose_size(content: dict[Any, Any], size: str | None) -> None:
    """Takes what a size says in the place of what stands outside of ``sizes``."""
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
    try:
        value = parse_yaml(text, f"--set {key}")
    except FileError as error:
        raise JobError(str(error)) from None
    target = content
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise JobError(f"--set {override}: {part} is no section")
    if value is None:
        target.pop(parts[-1], None)
    else:
        target[parts[-1]] = value
