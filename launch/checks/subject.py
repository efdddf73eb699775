# SPDX-License-Identifier: Apache-2.0
"""What the preflight looks at, and what it says about it."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...cli import Whole
from ..estimates.shapes import Layout, layout_of
from ..launcher.environment import Profile, Setting, read_profile, resolve
from ..launcher.job import Job
from ..launcher.network import NetworkError, choose_interface, interfaces
from ..launcher.scheduler import ClusterError, Placement, detect


@dataclass
class Subject:
    """A job on this machine, prepared for the checks.

    Attributes:
        job: the job.
        args: its arguments, see :meth:`Job.arguments`.
        layout: its numbers.
        profile: environment profile.
        environ: what is exported here.
        settings: variables that the processes would see.
        interfaces: of this machine, None where they cannot be listed.
        interface: the chosen one, or None.
        interface_mistake: why none could be chosen, or None.
        place: of this machine in the job, or None.
        place_mistake: why it has none, or None.
    """

    job: Job
    args: argparse.Namespace
    layout: Layout
    profile: Profile
    environ: Mapping[str, str]
    settings: list[Setting] = field(default_factory=list)
    interfaces: dict[str, list[str]] | None = None
    interface: str | None = None
    interface_mistake: str | None = None
    place: Placement | None = None
    place_mistake: str | None = None

    @property
    def nodes(self) -> int:
        """Machines of the job."""
        return self.place.nodes if self.place else self.job.cluster.nodes or len(self.job.cluster.hosts) or 1

    def variable(self, name: str) -> str | None:
        """A variable as the processes would see it."""
        return next((s.value for s in self.settings if s.name == name), self.environ.get(name))

    def number(self, name: str) -> int | None:
        """A variable as a whole number; None where it is none, of which the check of the environment tells."""
        try:
            return Whole(0)(self.variable(name) or "")
        except argparse.ArgumentTypeError:
            return None


def prepare(
    job: Job, place: Placement | None = None, environ: Mapping[str, str] | None = None, node_rank: int | None = None
) -> Subject:
    """Looks at a job and at this machine.

    Args:
        job: the job.
        place: of this machine where it is known already.
        environ: instead of this process's environment.
        node_rank: as on the command line.

    Raises:
        JobError: the job file cannot be understood in full.
    """
    environ = os.environ if environ is None else environ
    cluster, mistake = job.cluster, None
    if place is None:
        try:
            place = detect(cluster, environ, node_rank)
        except ClusterError as error:
            mistake = str(error)
    available, interface, interface_mistake = None, None, None
    try:
        available = interfaces()
        interface = choose_interface(cluster, available)
    except NetworkError as error:
        interface_mistake = str(error) if available is not None or cluster.subnet or cluster.network_interface else None
    args, profile = job.arguments(), read_profile(cluster.profile)
    nodes = place.nodes if place else cluster.nodes or len(cluster.hosts) or 1
    return Subject(
        job=job,
        args=args,
        layout=layout_of(job, args, nodes * cluster.devices_per_node, job.vocab_size()),
        profile=profile,
        environ=environ,
        settings=resolve(profile, cluster, environ, interface),
        interfaces=available,
        interface=interface,
        interface_mistake=interface_mistake,
        place=place,
        place_mistake=mistake,
    )
