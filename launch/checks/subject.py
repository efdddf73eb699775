# SPDX-License-Identifier: Apache-2.0
"""What the preflight looks at, a job on this machine, and what it says about it."""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...cli import Whole
from ..estimates.shapes import layout_of
from ..estimates.teacher import Teacher, teacher_of
from ..launcher.environment import read_profile, resolve
from ..launcher.job import Job
from ..launcher.network import NetworkError, choose_interface, interfaces
from ..launcher.scheduler import ClusterError, Placement, place_of
from ..launcher.torchrun import latest_of


class Subject:
    """A job on this machine, prepared for the checks."""

    def __init__(
        self,
        job: Job,
        place: Placement | None = None,
        environ: Mapping[str, str] | None = None,
        node_rank: int | None = None,
    ) -> None:
        """Looks at a job and at this machine, whose place in it may be known, or its rank given.

        Raises:
            JobError: the job file cannot be understood in full.
        """
        self.job, cluster = job, job.cluster
        self.environ = os.environ if environ is None else environ
        # Of this machine in the job. Where it has none, why, and that of node 0 if the job has one.
        self.place, self.place_mistake = place, ""
        if place is None:
            try:
                self.place = place_of(job, self.environ, node_rank)
            except ClusterError as error:
                self.place_mistake = str(error)
                with contextlib.suppress(ClusterError):
                    self.place = place_of(job, self.environ, node_rank=0)
        # Those of this machine, None where they cannot be listed; the job's, and why it cannot have it.
        self.interfaces: dict[str, list[str]] | None = None
        self.interface: str | None = None
        self.interface_mistake: str | None = None
        try:
            self.interfaces = interfaces()
            self.interface = choose_interface(cluster, self.interfaces)
        except NetworkError as error:
            if self.interfaces is not None or cluster.subnet or cluster.network_interface:
                self.interface_mistake = str(error)
        self.args, self.profile = job.arguments(), read_profile(cluster.profile)
        self.nodes = self.place.nodes if self.place else cluster.nodes or len(cluster.hosts) or 1
        self.layout = layout_of(job, self.args, self.nodes * cluster.devices_per_node, job.vocab_size())
        # The variables that the processes would see.
        self.settings = resolve(self.profile, cluster, self.environ, self.interface)

    def variable(self, name: str) -> str | None:
        """A variable as the processes would see it."""
        return next((s.value for s in self.settings if s.name == name), self.environ.get(name))

    def number(self, name: str) -> int | None:
        """A variable as a whole number; None where it is none, of which the check of the environment tells."""
        try:
            return Whole(0)(self.variable(name) or "")
        except argparse.ArgumentTypeError:
            return None

    @functools.cached_property
    def teacher(self) -> Teacher | None:
        """The teacher that the job names; None where it is not there, or is none, of which its own check tells."""
        with contextlib.suppress(ValueError, OSError):
            return teacher_of(self.job, self.args, self.layout)
        return None

    def checkpoint(self) -> Path | None:
        """The checkpoint that the job would load first; None where there is none, or none that can be found."""
        flags = self.job.flags
        with contextlib.suppress(ValueError, OSError):
            for directory in (flags.get("load") or flags.get("save"), flags.get("pretrained-checkpoint")):
                found = None if directory is None else latest_of(self.job, str(directory))
                if found is not None:
                    return found
        return None


@dataclass(frozen=True)
class Finding:
    """One line of the table: a check's name, what it found, and what is to be done (empty for ``pass``)."""

    check: str
    status: Literal["pass", "warn", "fail"]  # fail stops a job before it starts, warn does not
    found: str
    cure: str = ""


def passed(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "pass", found)


def warned(check: str, found: str, cure: str) -> Finding:
    """The job may run; somebody should look."""
    return Finding(check, "warn", found, cure)


def failed(check: str, found: str, cure: str) -> Finding:
    """The job cannot run as it is."""
    return Finding(check, "fail", found, cure)


def judged(check: str, found: str, mistakes: list[tuple[str, str]]) -> list[Finding]:
    """One ``fail`` per (what was found, cure), or one ``pass``."""
    return [failed(check, what, cure) for what, cure in mistakes] or [passed(check, found)]


def in_turn(*checks: Callable[[Subject], Iterable[Finding]]) -> Callable[[Subject], list[Finding]]:
    """One check of several."""
    return lambda subject: [finding for check in checks for finding in check(subject)]
