# SPDX-License-Identifier: Apache-2.0
"""Which node of which job this is: from a list of hosts, SLURM, Kubernetes, ModelArts, or nobody.

What a scheduler says counts where the job file leaves something open; where both say something different, that is an
error. docs/cluster.md lists the variables that are read.
"""

import itertools
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...cli import Whole, from_environment
from .job import Cluster, Job, is_host_name
from .network import addresses_of, local_addresses

_RANK, _NODES, _PORT = Whole(0, 2**16), Whole(1, 2**16), Whole(1, 65535)


class ClusterError(ValueError):
    """This node's place in the job cannot be found, or two sources contradict each other."""


@dataclass(frozen=True)
class Placement:
    """This node's place in the job."""

    source: str  # who said so
    nodes: int
    node_rank: int  # from 0
    devices_per_node: int  # processes, one per device
    master_addr: str  # of node 0
    master_port: int  # of the rendezvous
    hosts: tuple[str, ...] = ()  # in rank order, where known
    notes: tuple[str, ...] = ()  # what else was found, one line each


@dataclass
class _Found:
    """What one source says; None where it says nothing."""

    source: str
    nodes: int | None = None
    node_rank: int | None = None
    devices: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    hosts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def place_of(job: Job, environ: Mapping[str, str], node_rank: int | None = None) -> Placement:
    """This node's place in a job, as :func:`detect` finds it; stage n, from 0, meets n ports above the first one.

    Node 0 may still hold the rendezvous of the stage before when another node has begun to look for the next one.

    Raises:
        ClusterError: see :func:`detect`; also where there are no such ports.
    """
    place = detect(job.cluster, environ, node_rank)
    port = place.master_port + job.number
    if mistake := _PORT.mistake(port):
        raise ClusterError(f"stage {job.stage} needs port {port}, {job.number} above the master's: it {mistake}")
    return replace(place, master_port=port)


def detect(cluster: Cluster, environ: Mapping[str, str], node_rank: int | None = None) -> Placement:
    """Finds this node's place; a ``node_rank`` of the command line beats every other source.

    Raises:
        ClusterError: with what is missing or what contradicts what.
    """
    name: str = cluster.scheduler
    if name == "auto":
        name = "hosts" if cluster.hosts else _scheduler(environ)
    found = _hosts(cluster.hosts) if name == "hosts" else _SOURCES[name](environ)
    nodes = cluster.nodes or found.nodes or 1
    if found.nodes not in (None, nodes):
        raise ClusterError(f"cluster.nodes is {nodes}, but {found.source} says {found.nodes} nodes")
    source = found.source if node_rank is None else f"{found.source}, --node-rank"
    rank = found.node_rank if node_rank is None else node_rank
    if rank is None and nodes > 1:
        raise ClusterError(
            f"{found.source} does not say which of the {nodes} nodes this is (it is called {_own_names()[0]}): give "
            "cluster.hosts with its name or address, or --node-rank"
        )
    rank = rank or 0
    if not 0 <= rank < nodes:
        raise ClusterError(f"node rank {rank} is not below the number of nodes, {nodes}")
    if found.devices not in (None, cluster.devices_per_node):
        raise ClusterError(
            f"cluster.devices-per-node is {cluster.devices_per_node}, but {found.source} says {found.devices}"
        )
    # A port of the scheduler's counts only with its address: PyTorchJob's service forwards no other one.
    master = cluster.master_addr or found.master_addr or (found.hosts[0] if found.hosts else None)
    if master is None and nodes > 1:
        raise ClusterError("nobody says where node 0 is: give cluster.master-addr or cluster.hosts")
    if master is not None and not is_host_name(master):
        raise ClusterError(f"the master's address {master!r} ({found.source}) is no legal host name or address")
    port = cluster.master_port if cluster.master_addr or found.master_port is None else found.master_port
    devices, master = cluster.devices_per_node, master or "127.0.0.1"
    return Placement(source, nodes, rank, devices, master, port, found.hosts, found.notes)


def expand_nodelist(text: str) -> list[str]:
    """The hosts of a SLURM node list, in order: ``n[01-03,7],gpu-a[1-2]b`` -> n01 n02 n03 n7 gpu-a1b gpu-a2b.

    Raises:
        ClusterError: the text is no node list.
    """
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", text):
        raise ClusterError(f"{text!r} is no SLURM node list: its brackets do not match")
    hosts: list[str] = []
    # Split at commas outside of brackets.
    for item in re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text):
        parts = re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item)
        choices = [[literal] if literal else _numbers(ranges, text) for literal, ranges in parts]
        hosts += map("".join, itertools.product(*choices))
    bad = [host for host in hosts if not is_host_name(host)]
    if bad or not hosts or len(hosts) != len(set(hosts)):
        raise ClusterError(f"{text!r} is no SLURM node list" + (f": {bad[0]!r} is no host name" if bad else ""))
    return hosts


def _numbers(ranges: str, text: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or not 0 <= int(match[2] or match[1]) - int(match[1]) <= 100_000:
            raise ClusterError(f"{text!r} is no SLURM node list: {part!r} is no range")
        first, last = match[1], match[2] or match[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def _scheduler(environ: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" in environ and ("SLURM_NNODES" in environ or "SLURM_JOB_NUM_NODES" in environ):
        return "slurm"
    if "MA_NUM_HOSTS" in environ or "VC_WORKER_HOSTS" in environ:
        return "modelarts"
    if "PET_NNODES" in environ or {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= set(environ):
        return "kubernetes"
    return "single"


def _hosts(hosts: tuple[str, ...]) -> _Found:
    if not hosts:
        raise ClusterError("cluster.scheduler is hosts, and cluster.hosts is empty")
    return _Found("cluster.hosts", len(hosts), _own_index(hosts), hosts=hosts)


def _slurm(environ: Mapping[str, str]) -> _Found:
    nodes = _integer(environ, "SLURM_NNODES", "SLURM_JOB_NUM_NODES", kind=_NODES)
    listed = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST") or ""
    hosts = tuple(expand_nodelist(listed)) if listed else ()
    if nodes is not None and hosts and nodes != len(hosts):
        raise ClusterError(f"SLURM_NNODES is {nodes}, but SLURM_JOB_NODELIST names {len(hosts)}: {listed}")
    tasks = _integer(environ, "SLURM_STEP_NUM_TASKS", kind=_NODES)
    notes: tuple[str, ...] = ()
    if "SLURM_STEP_ID" not in environ and (nodes or 1) > 1:
        notes = ("not inside srun: start this command by srun --ntasks-per-node=1, or only node 0 runs",)
    elif tasks is not None and nodes is not None and tasks != nodes:
        raise ClusterError(f"srun starts {tasks} tasks on {nodes} nodes: give it --ntasks-per-node=1")
    return _Found("SLURM", nodes or len(hosts) or None, _integer(environ, "SLURM_NODEID"), hosts=hosts, notes=notes)


def _kubernetes(environ: Mapping[str, str]) -> _Found:
    """``PET_*`` of Kubeflow Trainer and training operator; else as PyTorchJob has it: of pods, not of processes."""
    if "PET_NNODES" not in environ:
        return _Found(
            "Kubernetes (MASTER_ADDR, RANK)",
            _integer(environ, "WORLD_SIZE", kind=_NODES),
            _integer(environ, "RANK"),
            master_addr=environ.get("MASTER_ADDR"),
            master_port=_integer(environ, "MASTER_PORT", kind=_PORT),
        )
    endpoint, _, port = environ.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    # min:max of an elastic job; this launcher always wants all nodes.
    environ = {**environ, "PET_NNODES": environ["PET_NNODES"].rpartition(":")[2], "PET_RDZV_ENDPOINT": port}
    # torchrun also takes words here, such as auto.
    words = environ.get("PET_NPROC_PER_NODE", "").isalpha()
    return _Found(
        "Kubernetes (PET_*)",
        _integer(environ, "PET_NNODES", kind=_NODES),
        _integer(environ, "PET_NODE_RANK", "RANK"),
        None if words else _integer(environ, "PET_NPROC_PER_NODE", kind=_NODES),
        environ.get("PET_MASTER_ADDR") or endpoint or environ.get("MASTER_ADDR"),
        _integer(environ, "PET_MASTER_PORT", "PET_RDZV_ENDPOINT", "MASTER_PORT", kind=_PORT),
    )


def _modelarts(environ: Mapping[str, str]) -> _Found:
    hosts = tuple(h.strip() for h in environ.get("VC_WORKER_HOSTS", "").split(",") if h.strip())
    nodes = _integer(environ, "MA_NUM_HOSTS", "VC_WORKER_NUM", kind=_NODES) or len(hosts) or None
    if hosts and nodes != len(hosts):
        raise ClusterError(f"MA_NUM_HOSTS or VC_WORKER_NUM is {nodes}, but VC_WORKER_HOSTS names {len(hosts)}")
    rank = _integer(environ, "VC_TASK_INDEX", "VK_TASK_INDEX")
    # Of NPUs, too.
    devices = _integer(environ, "MA_NUM_GPUS", kind=_NODES)
    return _Found("ModelArts", nodes, rank, devices, hosts=hosts)


_SOURCES: dict[str, Callable[[Mapping[str, str]], _Found]] = {
    "single": lambda environ: _Found("no scheduler"),
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "modelarts": _modelarts,
}


def _integer(environ: Mapping[str, str], *names: str, kind: Whole = _RANK) -> int | None:
    """The first of these variables that says something."""
    name = next((name for name in names if environ.get(name)), names[0])
    try:
        return from_environment(name, kind, None, environ)
    except ValueError as error:
        raise ClusterError(str(error)) from None


def _own_names() -> list[str]:
    name = socket.gethostname()
    return list(dict.fromkeys([name, socket.getfqdn(), name.partition(".")[0]]))


def _own_index(hosts: Sequence[str]) -> int | None:
    """The number of the host that is this one: by name, else by an address that an interface here has."""
    mine = {name.lower() for name in _own_names()}
    matches = [i for i, host in enumerate(hosts) if host.lower() in mine]
    if not matches:
        addresses = local_addresses()
        matches = [i for i, host in enumerate(hosts) if not addresses.isdisjoint(addresses_of(host))]
    if len(matches) > 1:
        raise ClusterError(
            f"{', '.join(hosts[i] for i in matches)} in cluster.hosts are all this node: give --node-rank"
        )
    return matches[0] if matches else None
