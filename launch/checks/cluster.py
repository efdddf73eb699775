# SPDX-License-Identifier: Apache-2.0
"""Preflight: nodes, names, ports, interfaces, variables, and this machine's limits."""

import ipaddress
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ..launcher.scheduler import ClusterError, detect
from .finding import Finding, failed, judged, passed, warned
from .subject import Subject

_HCCL_PORTS = 16
_OPEN_FILES = 65536
_SHARED_MEMORY_GIB = 8
_GIB = 2**30


def check(subject: Subject) -> Iterator[Finding]:
    """All checks of this module."""
    yield from _place(subject)
    yield from _hosts(subject)
    yield from _port(subject)
    yield from _interface(subject)
    yield from _variables(subject)
    yield from _timeouts(subject)
    yield from _restarts(subject)
    yield from _devices(subject)
    yield from _limits(subject)
    yield from _rdma(subject)


def _place(subject: Subject) -> list[Finding]:
    cluster = subject.job.cluster
    if subject.place is not None:
        place = subject.place
        said = f"{place.source}: node {place.node_rank} of {place.nodes}, master {place.master_addr}"
        return [passed("node", said)] + [warned("node", note, "see docs/cluster.md") for note in place.notes]
    mistake = str(subject.place_mistake)
    try:
        place = detect(cluster, subject.environ, node_rank=0)
    except ClusterError:
        return [failed("node", mistake, "repair the cluster section; docs/cluster.md has one per scheduler")]
    subject.place = place
    return [warned("node", mistake, "on a login node this is expected; what follows holds for this machine alone")]


def _hosts(subject: Subject) -> list[Finding]:
    hosts = subject.job.cluster.hosts or (subject.place.hosts if subject.place else ())
    if not hosts:
        return []
    found = [
        (f"{h} is listed {hosts.count(h)} times", "a node is one host")
        for h in dict.fromkeys(hosts)
        if hosts.count(h) > 1
    ]
    addresses: dict[str, str] = {}
    for host in dict.fromkeys(hosts):
        try:
            address = str(socket.getaddrinfo(host, None)[0][4][0])
        except OSError:
            found.append((f"{host} cannot be resolved", "use an address, or add the name to DNS or /etc/hosts"))
            continue
        if address in addresses:
            found.append((f"{host} and {addresses[address]} are both {address}", "a node is one host"))
        elif len(hosts) > 1 and _is_loopback(address) and not all(_is_loopback(h) for h in hosts):
            found.append((f"{host} resolves to {address} here, which other nodes cannot reach", "use its address"))
        addresses[address] = host
    return judged("hosts", f"{len(hosts)} hosts, all of them resolve", found)


def _port(subject: Subject) -> list[Finding]:
    cluster, place = subject.job.cluster, subject.place
    port = place.master_port if place else cluster.master_port
    if port < 1024:
        return [failed("master-port", f"{port} is reserved for the system", "choose one from 1024 to 65535")]
    hccl = _hccl_ports(subject)
    if port in hccl:
        what = f"{port} is one of HCCL's ports, {hccl[0]} to {hccl[-1]}"
        return [failed("master-port", what, "choose another master-port, or HCCL_IF_BASE_PORT")]
    here = place is None or place.node_rank == 0 and subject.place_mistake is None
    if here and not _is_free(port):
        return [failed("master-port", f"{port} is in use on this node", "choose another, or end what listens there")]
    low, high = _ephemeral_ports()
    if low <= port <= high:
        what = f"{port} lies in {low}-{high}, where any outgoing connection may sit"
        return [warned("master-port", what, f"choose one below {low}")]
    if hccl and low <= hccl[-1] and hccl[0] <= high:
        what = f"HCCL's ports {hccl[0]}-{hccl[-1]} lie in {low}-{high}, where any outgoing connection may sit"
        cure = f"HCCL_IF_BASE_PORT above {high}, or sysctl -w net.ipv4.ip_local_reserved_ports={hccl[0]}-{hccl[-1]}"
        return [warned("master-port", what, cure)]
    return [passed("master-port", f"{port}" + (" is free" if here else ""))]


def _hccl_ports(subject: Subject) -> range:
    base = subject.number("HCCL_IF_BASE_PORT")
    if subject.profile.device != "npu" or base is None:
        return range(0)
    return range(base, base + _HCCL_PORTS)


def _interface(subject: Subject) -> list[Finding]:
    if subject.interface_mistake is not None:
        return [failed("network-interface", subject.interface_mistake, "name one of those, or a subnet they are in")]
    found = []
    for setting in subject.settings:
        name = setting.value.lstrip("=")
        exact = setting.name.endswith("_SOCKET_IFNAME") and (
            setting.name.startswith("GLOO") or "=" in setting.value[:1]
        )
        if exact and subject.interfaces is not None and not set(name.split(",")) & set(subject.interfaces):
            what = f"{setting.name}={setting.value} ({setting.origin}), which is not on this node"
            found.append((what, f"one of {', '.join(subject.interfaces)}"))
    findings = judged("network-interface", subject.interface or "none is chosen", found)
    if subject.nodes > 1 and subject.interface is None and not found:
        chosen = [s for s in subject.settings if s.name.endswith("_SOCKET_IFNAME")]
        if not chosen and subject.profile.device != "cpu":
            what = f"none is chosen, on {subject.nodes} nodes"
            findings = [warned("network-interface", what, "give cluster.network-interface or cluster.subnet")]
    return findings


def _variables(subject: Subject) -> list[Finding]:
    by_name = {variable.name: variable for variable in subject.profile.variables}
    found, kept = [], []
    for setting in subject.settings:
        mistake = by_name[setting.name].mistake(setting.value) if setting.name in by_name else None
        if mistake:
            found.append((f"{setting.name}={setting.value} ({setting.origin}): {mistake}", "unset it, or correct it"))
        if setting.origin == "kept" and setting.name in by_name and "{interface}" not in by_name[setting.name].value:
            kept.append(f"{setting.name}={setting.value}")
    findings = judged("environment", f"profile {subject.profile.name}, {len(subject.settings)} variables", found)
    if kept:
        what = f"exported before, and kept: {', '.join(kept)}"
        findings.append(warned("environment", what, "unset them, or set cluster.override-environment"))
    buffer = subject.number("HCCL_BUFFSIZE")
    x = subject.layout
    useful = -(-x.micro_batch * x.sequence * x.hidden * 2 // 2**20)
    if subject.profile.device == "npu" and buffer and buffer < useful:
        what = f"HCCL_BUFFSIZE={buffer} MB is less than an activation of {useful} MB"
        findings.append(warned("environment", what, f"{useful} or more: smaller ones slow collectives down"))
    return findings


def _timeouts(subject: Subject) -> list[Finding]:
    args, cluster = subject.args, subject.job.cluster
    minutes = args.distributed_timeout_minutes
    found = []
    if minutes > 24 * 60:
        found.append(f"--distributed-timeout-minutes {minutes} holds a dead job for more than a day")
    exec_timeout = subject.number("HCCL_EXEC_TIMEOUT") if subject.profile.device == "npu" else None
    if exec_timeout == 0:
        found.append("HCCL_EXEC_TIMEOUT=0 waits for ever for a dead rank")
    elif exec_timeout is not None and exec_timeout < 300:
        found.append(f"HCCL_EXEC_TIMEOUT={exec_timeout} s is less than a save of a large checkpoint may take")
    if subject.nodes > 1 and cluster.rendezvous_timeout < 60:
        found.append(f"the nodes wait {cluster.rendezvous_timeout} s for each other, less than starting torch may take")
    if found:
        return [warned("time-outs", "; ".join(found), "10 to 60 minutes suit most clusters")]
    return [passed("time-outs", f"{minutes} minutes, nodes wait {cluster.rendezvous_timeout} s for each other")]


def _restarts(subject: Subject) -> list[Finding]:
    cluster = subject.job.cluster
    if cluster.rendezvous == "static" and cluster.max_restarts and subject.nodes > 1:
        what = f"{cluster.max_restarts} restarts with a static rendezvous on {subject.nodes} nodes"
        cure = "cluster.rendezvous: c10d; a static one cannot gather the nodes again"
        return [warned("restarts", what, cure)]
    return [passed("restarts", f"up to {cluster.max_restarts}, {cluster.rendezvous} rendezvous")]


def _devices(subject: Subject) -> list[Finding]:
    wanted, kind = subject.job.cluster.devices_per_node, subject.profile.device
    here = device_count(kind)
    if here is None:
        return [passed("devices", f"{wanted} processes on {len(os.sched_getaffinity(0))} cores")]
    if here == 0:
        what = f"no {kind} device on this machine, the job wants {wanted} per node"
        return [warned("devices", what, "on a login node this is expected; else check npu-smi info or nvidia-smi")]
    if here < wanted:
        return [failed("devices", f"{here} {kind} devices here, the job wants {wanted} per node", "devices-per-node")]
    return [passed("devices", f"{here} {kind} devices")]


def device_count(kind: str) -> int | None:
    """Devices of a kind on this machine, without loading a driver; None for the CPU."""
    if kind == "npu":
        return len([p for p in Path("/dev").glob("davinci[0-9]*")])
    if kind == "cuda":
        return len([p for p in Path("/dev").glob("nvidia[0-9]*")])
    return None


def _limits(subject: Subject) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if subject.profile.device != "cpu" and soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        cure = f"ulimit -n {_OPEN_FILES} (hard limit here {hard}); sockets and data loaders need many"
        yield warned("open-files", f"{soft}", cure)
    else:
        yield passed("open-files", "no limit" if soft == resource.RLIM_INFINITY else str(soft))
    shared = shutil.disk_usage("/dev/shm").total / _GIB if Path("/dev/shm").is_dir() else 0.0
    workers = subject.args.num_workers
    if shared < _SHARED_MEMORY_GIB and (workers or subject.profile.device != "cpu"):
        cure = f"start the container with --shm-size={_SHARED_MEMORY_GIB}g or more, or --ipc=host"
        yield warned("shared-memory", f"/dev/shm has {shared:.1f} GiB", cure)
    else:
        yield passed("shared-memory", f"/dev/shm has {shared:.1f} GiB")
    yield passed("python", f"{platform.python_version()} here: every node needs the same minor version")


def _rdma(subject: Subject) -> list[Finding]:
    if subject.nodes == 1 or subject.profile.device == "cpu":
        return []
    if subject.profile.device == "npu":
        if not Path("/etc/hccn.conf").is_file():
            what = "no /etc/hccn.conf: the NPUs' own network ports seem to have no addresses"
            return [warned("rdma", what, "hccn_tool -i 0 -ip -g shows them; on a login node this is expected")]
        return [passed("rdma", "/etc/hccn.conf is there; hccn_tool -i N -link -g shows each port")]
    if not any(Path("/sys/class/infiniband").glob("*")):
        return [warned("rdma", "no RDMA device under /sys/class/infiniband", "NCCL will use TCP between the nodes")]
    return [passed("rdma", "RDMA devices are there")]


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the rendezvous store binds: a connection that is still closing does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _ephemeral_ports() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 32768, 60999
    return int(low), int(high)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
