# SPDX-License-Identifier: Apache-2.0
"""The network interfaces of this node, and the choice of the one that a job uses."""

import ipaddress
import socket

from .job import Cluster


class NetworkError(ValueError):
    """The error that this node does not have the interface that a job asks for, or that it cannot be found."""


def interfaces() -> dict[str, list[str]]:
    """Returns the IP addresses of each network interface, in the order of the system.

    Raises:
        NetworkError: if psutil is not installed.
    """
    try:
        import psutil
    except ModuleNotFoundError:
        raise NetworkError("listing the network interfaces needs psutil: pip install psutil") from None
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
    }


def addresses_of(host: str) -> list[str]:
    """Returns the IP addresses that a name resolves to on this node, in the resolver's order; empty if it does not."""
    try:
        return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, None)))
    except OSError:
        return []


def local_addresses() -> set[str]:
    """Returns all IP addresses of this node; if psutil is missing, only those that its host name resolves to."""
    try:
        return {address for addresses in interfaces().values() for address in addresses}
    except NetworkError:
        return set(addresses_of(socket.gethostname()))


def choose_interface(cluster: Cluster, available: dict[str, list[str]] | None = None) -> str | None:
    """Returns the interface that the job asks for, by name or by subnet; None if it asks for none.

    Raises:
        NetworkError: if this node has no such interface, or several in the subnet; the message names the candidates.
    """
    if cluster.network_interface is None and cluster.subnet is None:
        return None
    found = interfaces() if available is None else available
    here = ", ".join(f"{name} ({' '.join(addresses) or 'no address'})" for name, addresses in found.items())
    if cluster.network_interface is not None:
        if cluster.network_interface not in found:
            raise NetworkError(f"cluster.network-interface {cluster.network_interface} is not on this node: {here}")
        return cluster.network_interface
    network = ipaddress.ip_network(str(cluster.subnet))
    matches = [name for name, addresses in found.items() if any(ipaddress.ip_address(a) in network for a in addresses)]
    if len(matches) != 1:
        said = f"are several: {', '.join(matches)}" if matches else f"is none: {here}"
        raise NetworkError(
            f"cluster.subnet {cluster.subnet}: of the interfaces of this node with an address in it there {said}"
        )
    return matches[0]
