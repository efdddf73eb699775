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

The keys of ``model`` to ``logging`` are the flags of ``launch/pretrain.py --help`` without their dashes, under the
heading that the help gives them; ``preset`` is ``--model``. A switch takes ``true`` (``false`` leaves it out). The keys
of ``cluster`` are the fields of :class:`Cluster`. An unknown key is an error that names the nearest known one; so is a
value of the wrong type. Nothing is expanded, and nothing in the file is ever seen by a shell.
"""

import argparse
import dataclasses
import difflib
import functools
import ipaddress
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bitcpm_megatron.launch import presets
from bitcpm_megatron.training.arguments import build_parser

DIRECTORY = Path(__file__).parent / "jobs"
BUILT_IN, MEGATRON_LM = "built-in", "megatron-lm"
SCHEDULERS = ("auto", "single", "hosts", "slurm", "kubernetes", "modelarts")
_SECTIONS = ("model", "parallelism", "training", "data", "checkpoint", "logging", "ternary")
_TOP = ("description", "host", *_SECTIONS, "cluster")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


class JobError(ValueError):
    """A job file, or an override of it, that is not there or not understood."""


@dataclass(frozen=True)
class Host:
    """The training loop that runs; see the module."""

    kind: str = BUILT_IN
    megatron_path: str | None = None
    mindspeed_path: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
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
        bind_cores: ``none`` (the profile's variables decide) or ``numa`` (``launch/bind_cores.py``).
        environment: variables that replace the profile's.
        override_environment: whether the profile replaces what is exported already.
    """

    profile: str = "cpu"
    scheduler: str = "auto"
    nodes: int | None = None
    devices_per_node: int = 1
    device_memory_gib: float | None = None
    hosts: tuple[str, ...] = ()
    master_addr: str | None = None
    master_port: int = 29500
    rendezvous: str = "static"
    rendezvous_id: str | None = None
    rendezvous_timeout: int = 900
    keep_alive_seconds: int = 15
    max_restarts: int = 0
    network_interface: str | None = None
    subnet: str | None = None
    bind_cores: str = "none"
    environment: Mapping[str, str] = field(default_factory=dict)
    override_environment: bool = False


@dataclass(frozen=True)
class Job:
    """A job file, understood.

    Attributes:
        name: stem of the file.
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
        """
        parser = build_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        try:
            return parser.parse_args([*(presets.flags(self.preset) if self.preset else []), *self.argv()])
        except presets.PresetError as error:
            raise JobError(str(error)) from None

    def vocab_size(self) -> int | None:
        """Tokens without padding, by ``data.vocab-size`` or else by the preset; None where neither says."""
        if "vocab-size" in self.flags:
            return int(self.flags["vocab-size"])
        return int(presets.read(self.preset)["vocab-size"]) if self.preset else None


def names() -> list[str]:
    """The job files that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read_job(name: str, overrides: Sequence[str] = ()) -> Job:
    """Reads a job by file, or by the name of one that comes with the package.

    Args:
        name: file or name.
        overrides: ``section.key=value`` (``cluster.nodes=2``, ``host.flags.use-flash-attn=true``), values in YAML; an
            empty value takes the key out, or a whole section.

    Raises:
        JobError: naming the file, the key and what is expected.
    """
    path = DIRECTORY / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        raise JobError(f"{name}: no such job file, and no job of that name: choose one of {', '.join(names())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"{path}: {error}") from None
    try:
        if not isinstance(content, dict):
            raise JobError(f"expected a mapping with some of {', '.join(_TOP)}")
        for override in overrides:
            _override(content, override)
        return _job(path, content)
    except JobError as error:
        raise JobError(f"{path}: {error}") from None


def as_argv(flag: str, value: Any) -> list[str]:
    """A flag and its value as a command line has them; a switch that is false is left out."""
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def is_host_name(text: str) -> bool:
    """Whether a text is an IP address or a legal host name (RFC 1123, underscores tolerated)."""
    try:
        ipaddress.ip_address(text)
        return True
    except ValueError:
        return 0 < len(text) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in text.split("."))


def nearest(key: str, known: Sequence[str]) -> str:
    """``: did you mean ...?``, or the list of what is known where nothing is near."""
    close = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    return f": did you mean {close[0]}?" if close else f": known are {', '.join(known)}"


def _refuse(message: str) -> NoReturn:
    raise JobError(message)


def _job(path: Path, content: dict[Any, Any]) -> Job:
    for key in content:
        if key not in _TOP:
            raise JobError(f"unknown section {key!r}{nearest(str(key), _TOP)}")
    description = content.get("description", "")
    if not isinstance(description, str):
        raise JobError("description: expected text")
    flags: dict[str, Any] = {}
    preset = None
    for section in _SECTIONS:
        entries = dict(_mapping(section, content.get(section, {})))
        if section == "model" and "preset" in entries:
            preset = entries.pop("preset")
            if not isinstance(preset, str):
                raise JobError("model.preset: expected the name of a preset, or a file")
        for key, value in entries.items():
            flags[key] = _flag_value(section, key, value)
    host = _host(_mapping("host", content.get("host", {})))
    return Job(path.stem, path, description, host, preset, flags, _cluster(content.get("cluster", {})))


def _mapping(what: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise JobError(f"{what}: expected a mapping, got {value!r}")
    return value


@functools.cache
def _actions() -> dict[str, dict[str, argparse.Action]]:
    """Section -> key -> the argument of our parser."""
    groups = {group.title: group for group in build_parser()._action_groups}
    return {
        section: {a.option_strings[0].removeprefix("--"): a for a in groups[section]._group_actions}
        for section in _SECTIONS
    }


def section_of(flag: str) -> str | None:
    """The section that a flag of our loop belongs to; None for a flag it does not have."""
    return next((section for section, actions in _actions().items() if flag in actions), None)


def _flag_value(section: str, key: Any, value: Any) -> Any:
    known = _actions()[section]
    where = f"{section}.{key}"
    if key not in known:
        elsewhere = section_of(str(key))
        hint = f": it belongs to section {elsewhere}" if elsewhere else nearest(str(key), sorted(known))
        raise JobError(f"unknown key {where}{hint}")
    action = known[key]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise JobError(f"{where}: expected true or false, got {value!r}")
        return value
    if action.nargs == "+":
        return [_scalar(where, action, item) for item in (value if isinstance(value, list) else [value])]
    return _scalar(where, action, value)


def _scalar(where: str, action: argparse.Action, value: Any) -> Any:
    if action.type is int:
        good = isinstance(value, int) and not isinstance(value, bool)
        expected = "a whole number"
    elif action.type is float:
        # YAML 1.1 reads 1e-4, without a point, as text.
        good = not isinstance(value, bool) and _is_number(value)
        expected = "a number"
    else:
        good = isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool))
        expected = "text"
    if not good:
        raise JobError(f"{where}: expected {expected}, got {value!r}")
    if action.choices is not None and value not in action.choices:
        raise JobError(f"{where}: {value!r} is none of {', '.join(map(str, action.choices))}")
    return value


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _host(content: Mapping[Any, Any]) -> Host:
    known = ("kind", "megatron-path", "mindspeed-path", "flags")
    for key in content:
        if key not in known:
            raise JobError(f"unknown key host.{key}{nearest(str(key), known)}")
    kind = content.get("kind", BUILT_IN)
    if kind not in (BUILT_IN, MEGATRON_LM):
        raise JobError(f"host.kind: {kind!r} is none of {BUILT_IN}, {MEGATRON_LM}")
    paths = {key: content.get(key) for key in ("megatron-path", "mindspeed-path")}
    for key, value in paths.items():
        if value is not None and not isinstance(value, str):
            raise JobError(f"host.{key}: expected a path, got {value!r}")
    flags = dict(_mapping("host.flags", content.get("flags", {})))
    if kind == BUILT_IN:
        idle = [f"host.{key}" for key in known[1:] if content.get(key)]
        if idle:
            raise JobError(f"{', '.join(idle)}: only the {MEGATRON_LM} host has use for it")
    elif paths["megatron-path"] is None:
        raise JobError(f"host.megatron-path: the {MEGATRON_LM} host needs the path of a Megatron-LM checkout")
    for key, value in flags.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
            raise JobError(f"host.flags: {key!r} is no name of a flag (write it without dashes in front)")
        if section_of(key) is not None:
            raise JobError(f"host.flags.{key}: it belongs to section {section_of(key)}")
        items = value if isinstance(value, list) else [value]
        if not items or any(isinstance(item, dict | list) or item is None for item in items):
            raise JobError(f"host.flags.{key}: expected true, a value or a list of values, got {value!r}")
    return Host(kind, paths["megatron-path"], paths["mindspeed-path"], flags)


def _cluster(content: Any) -> Cluster:
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(Cluster)}
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(Cluster)
    for key, value in _mapping("cluster", content).items():
        if key not in fields:
            raise JobError(f"unknown key cluster.{key}{nearest(str(key), sorted(fields))}")
        name = fields[key].name
        if name == "hosts" and isinstance(value, list):
            value = tuple(value)
        if name == "environment":
            value = _environment(value)
        elif not _fits(value, hints[name]):
            raise JobError(f"cluster.{key}: expected {_type_name(hints[name])}, got {value!r}")
        values[name] = value
    cluster = Cluster(**values)
    for name, good, expected in _CLUSTER_RULES:
        value = getattr(cluster, name)
        if value is not None and not good(value):
            raise JobError(f"cluster.{name.replace('_', '-')}: {value!r} is not {expected}")
    if cluster.network_interface and cluster.subnet:
        raise JobError("cluster.network-interface and cluster.subnet say the same: give one")
    return cluster


def _environment(value: Any) -> dict[str, str]:
    found = {}
    for name, text in _mapping("cluster.environment", value).items():
        if not isinstance(name, str) or not _ENVIRONMENT_NAME.fullmatch(name):
            raise JobError(f"cluster.environment: {name!r} is no name of a variable")
        if isinstance(text, bool) or not isinstance(text, str | int | float) or "\0" in str(text):
            raise JobError(f"cluster.environment.{name}: expected text or a number, got {text!r}")
        found[name] = str(text)
    return found


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in hint.__args__)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    if typing.get_origin(hint) is tuple:
        return "a list of host names"
    parts = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    return next(words[part.__name__] for part in parts if part is not type(None))


def _is_subnet(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


_CLUSTER_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("scheduler", lambda v: v in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}"),
    ("rendezvous", lambda v: v in ("static", "c10d"), "static or c10d"),
    ("bind_cores", lambda v: v in ("none", "numa"), "none or numa"),
    ("nodes", lambda v: v >= 1, "1 or more"),
    ("devices_per_node", lambda v: v >= 1, "1 or more"),
    ("device_memory_gib", lambda v: v > 0, "above 0"),
    ("master_port", lambda v: 1 <= v <= 65535, "a TCP port"),
    ("max_restarts", lambda v: v >= 0, "0 or more"),
    ("rendezvous_timeout", lambda v: v >= 1, "1 second or more"),
    ("keep_alive_seconds", lambda v: v >= 3, "3 seconds or more"),
    ("hosts", lambda v: all(map(is_host_name, v)), "a list of legal host names or addresses"),
    ("master_addr", is_host_name, "a legal host name or address"),
    ("rendezvous_id", lambda v: bool(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", v)), "a name of letters, digits, . _ -"),
    ("network_interface", lambda v: bool(re.fullmatch(r"[A-Za-z0-9._:@-]{1,15}", v)), "the name of an interface"),
    ("subnet", _is_subnet, "an address range such as 10.0.0.0/16 (host bits must be 0)"),
)


def _override(content: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise JobError(f"--set {override}: write section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"--set {override}: {error}") from None
    target = content
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise JobError(f"--set {override}: {part} is no section")
    if value is None:
        target.pop(parts[-1], None)
    else:
        target[parts[-1]] = value
