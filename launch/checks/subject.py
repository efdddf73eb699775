# SPDX-License-Identifier: Apache-2.0
"""The subject of the preflight, a job on this machine, and the findings about it."""

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
    """A job on this machine, with everything that the checks need to know about it."""

    def __init__(
        self,
        job: Job,
        place: Placement | None = None,
        environ: Mapping[str, str] | None = None,
        node_rank: int | None = None,
    ) -> None:
        """Collects the facts about a job and this machine.

        Args:
            job: the job.
            place: this machine's place in the job; None to detect it.
            environ: the environment variables; None for those of this process.
            node_rank: the rank of this node as given on the command line, for the detection.

        Raises:
            JobError: if the job file cannot be fully understood.
        """
        self.job, cluster = job, job.cluster
        self.environ = os.environ if environ is None else environ
        # This machine's place in the job. If it has none: the reason, and the place of node 0 if that can be found.
        self.place, self.place_mistake = place, ""
        if place is None:
            try:
                self.place = place_of(job, self.environ, node_rank)
            except ClusterError as error:
                self.place_mistake = str(error)
                with contextlib.suppress(ClusterError):
                    self.place = place_of(job, self.environ, node_rank=0)
        # The interfaces of this machine (None if they cannot be listed), the one for the job, and why there is none.
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
        self.layout = layout_of(self.args, self.nodes * cluster.devices_per_node, job.vocab_size())
        # The environment variables that the processes of the job would see.
        self.settings = resolve(self.profile, cluster, self.environ, self.interface)

    def variable(self, name: str) -> str | None:
        """Returns an environment variable as the processes of the job would see it."""
        return next((s.value for s in self.settings if s.name == name), self.environ.get(name))

    def number(self, name: str) -> int | None:
        """Returns an environment variable as a whole number; None if it is not one (reported by another check)."""
        try:
            return Whole(0)(self.variable(name) or "")
        except argparse.ArgumentTypeError:
            return None

    @functools.cached_property
    def teacher(self) -> Teacher | None:
        """The teacher that the job names; None if it is missing or unusable, which the teacher check reports."""
        with contextlib.suppress(ValueError, OSError):
            return teacher_of(self.args, self.layout)
        return None

    def checkpoint(self) -> Path | None:
        """Returns the checkpoint that the job would load first; None if there is none, or it cannot be found."""
        flags = self.job.flags
        with contextlib.suppress(ValueError, OSError):
            for directory in (flags.get("load") or flags.get("save"), flags.get("pretrained-checkpoint")):
                found = None if directory is None else latest_of(self.job, str(directory))
                if found is not None:
                    return found
        return None


@dataclass(frozen=True)
class Finding:
    """One line of the preflight table: the name of a check, what it found, and the cure (empty for ``pass``)."""

    check: str
    status: Literal["pass", "warn", "fail"]  # fail stops a job before it starts, warn does not
    found: str
    cure: str = ""


def passed(check: str, found: str) -> Finding:
    """Returns a finding that requires no action."""
    return Finding(check, "pass", found)


def warned(check: str, found: str, cure: str) -> Finding:
    """Returns a finding with which the job may run, but which somebody should look at."""
    return Finding(check, "warn", found, cure)


def failed(check: str, found: str, cure: str) -> Finding:
    """Returns a finding with which the job cannot run as it is."""
    return Finding(check, "fail", found, cure)


def judged(check: str, found: str, mistakes: list[tuple[str, str]]) -> list[Finding]:
    """Returns one ``fail`` per mistake (what was found, cure), or one ``pass`` if there are none."""
    return [failed(check, what, cure) for what, cure in mistakes] or [passed(check, found)]


def in_turn(*checks: Callable[[Subject], Iterable[Finding]]) -> Callable[[Subject], list[Finding]]:
    """Combines several checks into one that returns all their findings in order."""
    return lambda subject: [finding for check in checks for finding in check(subject)]
