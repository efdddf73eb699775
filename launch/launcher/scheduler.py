# SPDX-License-Identifier: Apache-2.0
"""Which node of which job this is: from a list of hosts, SLURM, Kubernetes, ModelArts, or nobody.

What a scheduler says counts where the job file leaves something open; where both say something different, that is an
error. Variables that are read:

- SLURM: ``SLURM_NNODES`` (or ``SLURM_JOB_NUM_NODES``), ``SLURM_NODEID``, ``SLURM_JOB_NODELIST``, ``SLURM_STEP_ID``,
  ``SLURM_STEP_NUM_TASKS``.
- Kubernetes: ``PET_NNODES``, ``PET_NODE_RANK``, ``PET_NPROC_PER_NODE``, ``PET_MASTER_ADDR``, ``PET_MASTER_PORT``,
  ``PET_RDZV_ENDPOINT`` (Kubeflow Trainer and training operator); without them ``MASTER_ADDR``, ``MASTER_PORT``,
  ``WORLD_SIZE`` (there: pods) and ``RANK`` (there: of the pod), as PyTorchJob sets them.
- ModelArts, Volcano: ``MA_NUM_HOSTS`` or ``VC_WORKER_NUM``, ``MA_NUM_GPUS`` (NPUs of a node, too), ``VC_TASK_INDEX``
  or ``VK_TASK_INDEX``, ``VC_WORKER_HOSTS``.
"""

import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...cli import Whole, from_environment
from .job import Cluster, is_host_name
from .network import local_addresses

_LOOPBACK = "127.0.0.1"


_RANK, _NODES, _PORT = Whole(0, 2**16), Whole(1, 2**16), Whole(1, 65535)


class ClusterError(ValueError):
    """This node's place in the job cannot be found, or two sources contradict each other."""


@dataclass(frozen=True)
class Placement:
    """This node's place in the job.

    Attributes:
        source: who said so.
        nodes: machines of the job.
        node_rank: number of this one, from 0.
        devices_per_node: processes per machine.
        master_addr: address of node 0.
        master_port: its rendezvous port.
        hosts: all machines in rank order, where known.
        notes: what else was found, one line each.
    """

    source: str
    nodes: int
    node_rank: int
    devices_per_node: int
    master_addr: str
    master_port: int
    hosts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.devices_per_node


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


def detect(cluster: Cluster, environ: Mapping[str, str], node_rank: int | None = None) -> Placement:
    """Finds this node's place.

    Args:
        cluster: of the job.
        environ: the environment of this process.
        node_rank: given on the command line; it beats every other source.

    Raises:
        ClusterError: with what is missing or what contradicts what.
    """
    name = cluster.scheduler if cluster.scheduler != "auto" else _scheduler(cluster, environ)
    found = _SOURCES[name](cluster, environ)
    nodes = _agreed("nodes", ("cluster.nodes", cluster.nodes), (found.source, found.nodes), 1)
    if node_rank is not None:
        rank, source = node_rank, f"{found.source}, --node-rank"
    elif found.node_rank is not None:
        rank, source = found.node_rank, found.source
    elif nodes == 1:
        rank, source = 0, found.source
    else:
        raise ClusterError(
            f"{found.source} does not say which of the {nodes} nodes this is (it is called {_own_names()[0]}): give "
            "cluster.hosts with its name or address, or --node-rank"
        )
    if not 0 <= rank < nodes:
        raise ClusterError(f"node rank {rank} is not below the number of nodes, {nodes}")
    if found.devices is not None and found.devices != cluster.devices_per_node:
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
    return Placement(
        source,
        nodes,
        rank,
        cluster.devices_per_node,
        master or _LOOPBACK,
        port,
        found.hosts,
        found.notes,
    )


def expand_nodelist(text: str) -> list[str]:
    """The hosts of a SLURM node list, in order: ``n[01-03,7],gpu-a[1-2]b`` -> n01 n02 n03 n7 gpu-a1b gpu-a2b.

    Raises:
        ClusterError: the text is no node list.
    """
    hosts: list[str] = []
    for item in _split(text):
        names = [""]
        for literal, bracket in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            ends = [literal] if literal else _numbers(bracket, text)
            names = [name + end for name in names for end in ends]
        hosts += names
    bad = [host for host in hosts if not is_host_name(host)]
    if bad or not hosts or len(hosts) != len(set(hosts)):
        raise ClusterError(f"{text!r} is no SLURM node list" + (f": {bad[0]!r} is no host name" if bad else ""))
    return hosts


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", text):
        raise ClusterError(f"{text!r} is no SLURM node list: its brackets do not match")
    return re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text)


def _numbers(ranges: str, text: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ClusterError(f"{text!r} is no SLURM node list: {part!r} is no range")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) > 100_000:
            raise ClusterError(f"{text!r} is no SLURM node list: {part!r} is no range")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def _scheduler(cluster: Cluster, environ: Mapping[str, str]) -> str:
    if cluster.hosts:
        return "hosts"
    if "SLURM_JOB_ID" in environ and ("SLURM_NNODES" in environ or "SLURM_JOB_NUM_NODES" in environ):
        return "slurm"
    if "MA_NUM_HOSTS" in environ or "VC_WORKER_HOSTS" in environ:
        return "modelarts"
    if "PET_NNODES" in environ or {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= set(environ):
        return "kubernetes"
    return "single"


def _single(cluster: Cluster, environ: Mapping[str, str]) -> _Found:
    return _Found("no scheduler")


def _hosts(cluster: Cluster, environ: Mapping[str, str]) -> _Found:
    if not cluster.hosts:
        raise ClusterError("cluster.scheduler is hosts, and cluster.hosts is empty")
    return _Found("cluster.hosts", len(cluster.hosts), _own_index(cluster.hosts), hosts=cluster.hosts)


def _slurm(cluster: Cluster, environ: Mapping[str, str]) -> _Found:
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


def _kubernetes(cluster: Cluster, environ: Mapping[str, str]) -> _Found:
    if "PET_NNODES" in environ:
        # min:max of an elastic job; this launcher always wants all nodes.
        text = environ["PET_NNODES"].rpartition(":")[2]
        processes = environ.get("PET_NPROC_PER_NODE", "")
        endpoint, _, port = environ.get("PET_RDZV_ENDPOINT", "").rpartition(":")
        ported = {"PET_RDZV_ENDPOINT": port}
        return _Found(
            "Kubernetes (PET_*)",
            _integer({"PET_NNODES": text}, "PET_NNODES", kind=_NODES),
            _integer(environ, "PET_NODE_RANK") if "PET_NODE_RANK" in environ else _integer(environ, "RANK"),
            # torchrun also takes words here, such as auto.
            None if processes.isalpha() else _integer(environ, "PET_NPROC_PER_NODE", kind=_NODES),
            environ.get("PET_MASTER_ADDR") or endpoint or environ.get("MASTER_ADDR"),
            _integer(environ, "PET_MASTER_PORT", kind=_PORT)
            or _integer(ported, "PET_RDZV_ENDPOINT", kind=_PORT)
            or _integer(environ, "MASTER_PORT", kind=_PORT),
        )
    return _Found(
        "Kubernetes (MASTER_ADDR, RANK)",
        _integer(environ, "WORLD_SIZE", kind=_NODES),
        _integer(environ, "RANK"),
        None,
        environ.get("MASTER_ADDR"),
        _integer(environ, "MASTER_PORT", kind=_PORT),
    )


def _modelarts(cluster: Cluster, environ: Mapping[str, str]) -> _Found:
    hosts = tuple(h.strip() for h in environ.get("VC_WORKER_HOSTS", "").split(",") if h.strip())
    nodes = _integer(environ, "MA_NUM_HOSTS", "VC_WORKER_NUM", kind=_NODES) or len(hosts) or None
    if hosts and nodes != len(hosts):
        raise ClusterError(f"MA_NUM_HOSTS or VC_WORKER_NUM is {nodes}, but VC_WORKER_HOSTS names {len(hosts)}")
    rank = _integer(environ, "VC_TASK_INDEX", "VK_TASK_INDEX")
    return _Found("ModelArts", nodes, rank, _integer(environ, "MA_NUM_GPUS", kind=_NODES), hosts=hosts)


_SOURCES: dict[str, Callable[[Cluster, Mapping[str, str]], _Found]] = {
    "single": _single,
    "hosts": _hosts,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "modelarts": _modelarts,
}


def _integer(environ: Mapping[str, str], *names: str, kind: Whole = _RANK) -> int | None:
    for name in names:
        if environ.get(name):
            try:
                return from_environment(name, kind, None, environ)
            except ValueError as error:
                raise ClusterError(str(error)) from None
    return None


def _agreed(what: str, one: tuple[str, int | None], other: tuple[str, int | None], default: int) -> int:
    if one[1] is not None and other[1] is not None and one[1] != other[1]:
        raise ClusterError(f"{one[0]} is {one[1]}, but {other[0]} says {other[1]} {what}")
    return one[1] or other[1] or default


def _own_names() -> list[str]:
    name = socket.gethostname()
    return list(dict.fromkeys([name, socket.getfqdn(), name.partition(".")[0]]))


def _own_index(hosts: Sequence[str]) -> int | None:
    """The number of the host that is this one: by name, else by an address that an interface here has."""
    mine = {name.lower() for name in _own_names()}
    matches = [i for i, host in enumerate(hosts) if host.lower() in mine]
    if not matches:
        addresses = local_addresses()
        matches = [i for i, host in enumerate(hosts) if _resolved(host) & addresses]
    if len(matches) > 1:
        raise ClusterError(
            f"{', '.join(hosts[i] for i in matches)} in cluster.hosts are all this node: give --node-rank"
        )
    return matches[0] if matches else None


def _resolved(host: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
