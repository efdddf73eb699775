# SPDX-License-Identifier: Apache-2.0
"""Detection of this node's place in a job: from a list of hosts, SLURM, Kubernetes, ModelArts, or without a scheduler.

The scheduler decides what the job file leaves open; if both give different values, that is an error. docs/cluster.md
lists the environment variables that are read.
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
    """The error that this node's place in the job cannot be found, or that two sources contradict each other."""


@dataclass(frozen=True)
class Placement:
    """The place of this node in a job, and where the job's nodes meet."""

    source: str  # name of the source of the information
    nodes: int
    node_rank: int  # rank of this node, from 0
    devices_per_node: int  # processes, one per device
    master_addr: str  # address of node 0
    master_port: int  # port of the rendezvous
    hosts: tuple[str, ...] = ()  # all hosts in rank order, if known
    notes: tuple[str, ...] = ()  # remarks for the user, one line each


@dataclass
class _Found:
    """The information of one source; None for what it does not give."""

    source: str
    nodes: int | None = None
    node_rank: int | None = None
    devices: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    hosts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def place_of(job: Job, environ: Mapping[str, str], node_rank: int | None = None) -> Placement:
    """Returns this node's place in a job or stage; stage n, from 0, uses the port n above that of the first stage.

    Each stage has a port of its own because node 0 may still hold the rendezvous of a stage when another node already
    looks for that of the next one.

    Raises:
        ClusterError: if :func:`detect` raises it, or the port of the stage is too high.
    """
    place = detect(job.cluster, environ, node_rank)
    port = place.master_port + job.number
    if mistake := _PORT.mistake(port):
        raise ClusterError(f"stage {job.stage} needs port {port}, {job.number} above the master's: it {mistake}")
    return replace(place, master_port=port)


def detect(cluster: Cluster, environ: Mapping[str, str], node_rank: int | None = None) -> Placement:
    """Finds this node's place; a ``node_rank`` from the command line overrides every other source.

    Raises:
        ClusterError: if information is missing or contradictory; the message says which.
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
    # The scheduler's port is used only with the scheduler's address: PyTorchJob's service forwards no other port.
    master = cluster.master_addr or found.master_addr or (found.hosts[0] if found.hosts else None)
    if master is None and nodes > 1:
        raise ClusterError("nobody says where node 0 is: give cluster.master-addr or cluster.hosts")
    if master is not None and not is_host_name(master):
        raise ClusterError(f"the master's address {master!r} ({found.source}) is no legal host name or address")
    port = cluster.master_port if cluster.master_addr or found.master_port is None else found.master_port
    devices, master = cluster.devices_per_node, master or "127.0.0.1"
    return Placement(source, nodes, rank, devices, master, port, found.hosts, found.notes)


def expand_nodelist(text: str) -> list[str]:
    """Expands a SLURM node list, in order: ``n[01-03,7],gpu-a[1-2]b`` -> n01 n02 n03 n7 gpu-a1b gpu-a2b.

    Raises:
        ClusterError: if the text is not a node list.
    """
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", text):
        raise ClusterError(f"{text!r} is no SLURM node list: its brackets do not match")
    hosts: list[str] = []
    # Split at commas outside brackets.
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
    """Reads ``PET_*`` (Kubeflow Trainer, training operator), or PyTorchJob's RANK and WORLD_SIZE, which count pods."""
    if "PET_NNODES" not in environ:
        return _Found(
            "Kubernetes (MASTER_ADDR, RANK)",
            _integer(environ, "WORLD_SIZE", kind=_NODES),
            _integer(environ, "RANK"),
            master_addr=environ.get("MASTER_ADDR"),
            master_port=_integer(environ, "MASTER_PORT", kind=_PORT),
        )
    endpoint, _, port = environ.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    # An elastic job gives min:max; this launcher always waits for all nodes.
    environ = {**environ, "PET_NNODES": environ["PET_NNODES"].rpartition(":")[2], "PET_RDZV_ENDPOINT": port}
    # torchrun also takes words for this number, such as "auto".
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
    # In spite of its name this variable also counts NPUs.
    devices = _integer(environ, "MA_NUM_GPUS", kind=_NODES)
    return _Found("ModelArts", nodes, rank, devices, hosts=hosts)


_SOURCES: dict[str, Callable[[Mapping[str, str]], _Found]] = {
    "single": lambda environ: _Found("no scheduler"),
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "modelarts": _modelarts,
}


def _integer(environ: Mapping[str, str], *names: str, kind: Whole = _RANK) -> int | None:
    """Returns the value of the first of these variables that is set and not empty, or None."""
    name = next((name for name in names if environ.get(name)), names[0])
    try:
        return from_environment(name, kind, None, environ)
    except ValueError as error:
        raise ClusterError(str(error)) from None


def _own_names() -> list[str]:
    name = socket.gethostname()
    return list(dict.fromkeys([name, socket.getfqdn(), name.partition(".")[0]]))


def _own_index(hosts: Sequence[str]) -> int | None:
    """Returns the index of this node among the hosts: by name, else by an address of one of its interfaces; or None."""
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
