# SPDX-License-Identifier: Apache-2.0
"""Starts this node's part of a job: ``launch/run.py JOB.yaml`` on every node, by whatever starts commands there.

    python launch/run.py JOB.yaml --print               show what would run, and run nothing
    python launch/run.py JOB.yaml                       under SLURM, Kubernetes, ModelArts or with cluster.hosts
    python launch/run.py JOB.yaml --node-rank 1         this is node 1, whatever anything else says
    python launch/run.py JOB.yaml --set training.lr=1e-4 --set cluster.nodes=4

``JOB.yaml`` is a job file (docs/cluster.md has the schema) or the name of one in ``launch/jobs``. The
``torchrun`` command replaces this process; its exit status is torchrun's. Exit status of its own: 2 bad job or
arguments, 3 the preflight (``--preflight``) found a mistake.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.launch.launcher import environment
from bitcpm_megatron.launch.launcher.job import read_job
from bitcpm_megatron.launch.launcher.network import choose_interface, interfaces
from bitcpm_megatron.launch.launcher.scheduler import Placement, detect
from bitcpm_megatron.launch.launcher.torchrun import environment as child_environment
from bitcpm_megatron.launch.launcher.torchrun import resume, torchrun


def main(argv: list[str] | None = None) -> int:
    """Prints this node's command, or becomes it; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", metavar="JOB.yaml")
    parser.add_argument("--print", action="store_true", help="show the command and the environment, start nothing")
    parser.add_argument("--node-rank", type=cli.Whole(0, 2**16), metavar="N", help="number of this node, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change the job file")
    parser.add_argument(
        "--preflight", action="store_true", help="check the job on this node first, and stop if it fails"
    )
    args = parser.parse_args(argv)
    return cli.run(lambda: _start(args))


def _start(args: argparse.Namespace) -> int:
    job = read_job(args.job, args.set)
    cluster = job.cluster
    place = detect(cluster, os.environ, args.node_rank)
    interface = choose_interface(cluster)
    settings = environment.resolve(environment.read_profile(cluster.profile), cluster, os.environ, interface)
    job.arguments()
    command = torchrun(job, place, _local_address(place, interface))
    restarts = f", up to {cluster.max_restarts} restarts" if cluster.max_restarts else ""
    print(f"job: {job.name}: {job.description}")
    print(
        f"cluster: {place.source}: node {place.node_rank} of {place.nodes}, {place.devices_per_node} processes each, "
        f"{cluster.rendezvous} rendezvous at {place.master_addr}:{place.master_port}{restarts}"
    )
    if interface is not None:
        print(f"network interface: {interface}")
    for note in place.notes:
        print(f"note: {note}")
    print(f"environment (profile {Path(cluster.profile).stem}):\n{environment.table(settings)}")
    print(f"checkpoints: {resume(job).line}")
    print(f"command:\n  {display(command)}", flush=True)
    if args.print:
        return 0
    if args.preflight:
        from bitcpm_megatron.launch import preflight

        if status := preflight.report(job, place):
            return status
    variables = child_environment(os.environ, {s.name: s.value for s in settings})
    os.execve(command[0], command, variables)


def display(command: Sequence[str]) -> str:
    """A command for people, quoted, a flag with its values per line."""
    lines: list[list[str]] = [[]]
    for part in command:
        if part.startswith("--") or part.endswith(".py"):
            lines.append([])
        lines[-1].append(shlex.quote(part))
    return " \\\n    ".join(" ".join(line) for line in lines if line)


def _local_address(place: Placement, interface: str | None) -> str | None:
    """By which the others reach this node: an address of the chosen interface, else its name in the list of hosts."""
    if interface is not None:
        addresses = interfaces().get(interface, [])
        return next(iter(sorted(addresses, key=lambda address: ":" in address)), None)
    return place.hosts[place.node_rank] if place.hosts else None


if __name__ == "__main__":
    sys.exit(main())
