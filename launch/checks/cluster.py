# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of the cluster: nodes, host names, ports, interfaces, environment variables, and machine limits."""

import os
import platform
import resource
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..estimates.memory import GIB
from ..launcher.network import addresses_of
from .subject import Finding, Subject, failed, in_turn, judged, passed, warned

_HCCL_PORTS = 16
_OPEN_FILES = 65536
_SHARED_MEMORY_GIB = 8


def _place(subject: Subject) -> list[Finding]:
    place, mistake = subject.place, subject.place_mistake
    if place is None:
        return [failed("node", mistake, "repair the cluster section; docs/cluster.md has one per scheduler")]
    if mistake:
        cure = "on a login node this is expected; what follows holds for this machine alone"
        return [warned("node", mistake, cure)]
    said = f"{place.source}: node {place.node_rank} of {place.nodes}, master {place.master_addr}"
    return [passed("node", said)] + [warned("node", note, "see docs/cluster.md") for note in place.notes]


def _hosts(subject: Subject) -> list[Finding]:
    hosts = subject.job.cluster.hosts or (subject.place.hosts if subject.place else ())
    counts = Counter(hosts)
    found = [(f"{h} is listed {n} times", "a node is one host") for h, n in counts.items() if n > 1]
    known: dict[str, str] = {}
    for host in counts:
        address = next(iter(addresses_of(host)), None)
        if address is None:
            found.append((f"{host} cannot be resolved", "use an address, or add the name to DNS or /etc/hosts"))
            continue
        if address in known:
            found.append((f"{host} and {known[address]} are both {address}", "a node is one host"))
        elif len(hosts) > 1 and _is_loopback(address) and not all(_is_loopback(h) for h in hosts):
            found.append((f"{host} resolves to {address} here, which other nodes cannot reach", "use its address"))
        known[address] = host
    return judged("hosts", f"{len(hosts)} hosts, all of them resolve", found) if hosts else []


def _port(subject: Subject) -> list[Finding]:
    cluster, place = subject.job.cluster, subject.place
    port = place.master_port if place else cluster.master_port
    if port < 1024:
        return [failed("master-port", f"{port} is reserved for the system", "choose one from 1024 to 65535")]
    base = subject.number("HCCL_IF_BASE_PORT") if subject.profile.device == "npu" else None
    hccl = range(0) if base is None else range(base, base + _HCCL_PORTS)
    if port in hccl:
        what = f"{port} is one of HCCL's ports, {hccl[0]} to {hccl[-1]}"
        return [failed("master-port", what, "choose another master-port, or HCCL_IF_BASE_PORT")]
    here = place is None or place.node_rank == 0 and not subject.place_mistake
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


def _interface(subject: Subject) -> list[Finding]:
    if subject.interface_mistake is not None:
        return [failed("network-interface", subject.interface_mistake, "name one of those, or a subnet they are in")]
    here, chosen = subject.interfaces, [s for s in subject.settings if s.name.endswith("_SOCKET_IFNAME")]
    found = [
        (f"{s.name}={s.value} ({s.origin}), which is not on this node", f"one of {', '.join(here)}")
        for s in chosen
        # Other values are prefixes of interface names.
        if here is not None and (s.name.startswith("GLOO") or s.value.startswith("="))
        if not set(s.value.lstrip("=").split(",")) & set(here)
    ]
    if subject.nodes > 1 and subject.interface is None and not chosen and subject.profile.device != "cpu":
        what = f"none is chosen, on {subject.nodes} nodes"
        return [warned("network-interface", what, "give cluster.network-interface or cluster.subnet")]
    return judged("network-interface", subject.interface or "none is chosen", found)


def _variables(subject: Subject) -> list[Finding]:
    variables, found, kept = subject.profile.variables, [], []
    for setting in subject.settings:
        variable, said = variables.get(setting.name), f"{setting.name}={setting.value}"
        if variable is None:
            continue
        if mistake := variable.mistake(setting.value):
            found.append((f"{said} ({setting.origin}): {mistake}", "unset it, or correct it"))
        if setting.origin == "kept" and "{interface}" not in variable.value:
            kept.append(said)
    name = Path(subject.job.cluster.profile).stem
    findings = judged("environment", f"profile {name}, {len(subject.settings)} variables", found)
    if kept:
        what = f"exported before, and kept: {', '.join(kept)}"
        findings.append(warned("environment", what, "unset them, or set cluster.override-environment"))
    buffer, x = subject.number("HCCL_BUFFSIZE"), subject.layout
    useful = -(-x.micro_batch * x.sequence * x.hidden * 2 // 2**20)
    if subject.profile.device == "npu" and buffer and buffer < useful:
        what = f"HCCL_BUFFSIZE={buffer} MB is less than an activation of {useful} MB"
        findings.append(warned("environment", what, f"{useful} or more: smaller ones slow collectives down"))
    return findings


def _timeouts(subject: Subject) -> list[Finding]:
    args, cluster = subject.args, subject.job.cluster
    minutes, found = args.distributed_timeout_minutes, []
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
        return [warned("restarts", what, "cluster.rendezvous: c10d; a static one cannot gather the nodes again")]
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
    """Returns the number of devices of a kind on this machine, without loading a driver; None for the CPU."""
    driver = {"npu": "davinci", "cuda": "nvidia"}.get(kind)
    return None if driver is None else len(list(Path("/dev").glob(f"{driver}[0-9]*")))


def _limits(subject: Subject) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if subject.profile.device != "cpu" and soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        cure = f"ulimit -n {_OPEN_FILES} (hard limit here {hard}); sockets and data loaders need many"
        yield warned("open-files", f"{soft}", cure)
    else:
        yield passed("open-files", "no limit" if soft == resource.RLIM_INFINITY else str(soft))
    shared = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0
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
        # The rendezvous store binds with this option: a connection that is still closing does not occupy the port.
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
    return host in ("localhost", "::1") or host.startswith("127.")


check = in_turn(_place, _hosts, _port, _interface, _variables, _timeouts, _restarts, _devices, _limits, _rdma)
