# SPDX-License-Identifier: Apache-2.0
"""Starts this node's part of a job: ``launch/run.py JOB.yaml`` on every node, started in any way.

    python launch/run.py JOB.yaml --print               show what would run, and run nothing
    python launch/run.py JOB.yaml                       under SLURM, Kubernetes, ModelArts or with cluster.hosts
    python launch/run.py JOB.yaml --node-rank 1         this is node 1, whatever anything else says
    python launch/run.py JOB.yaml --set training.lr=1e-4 --set cluster.nodes=4

``JOB.yaml`` is a job file (docs/cluster.md has the schema) or the name of one in ``launch/jobs``. The ``torchrun``
command replaces this process, so that the exit status is that of torchrun. For a job with stages it is run for the
first stage that has not ended and then for each later one; the job ends with a stage that fails or is asked to stop.
Exit status of its own: 2 bad job or arguments, 3 the preflight (``--preflight``) found a mistake.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.launch.launcher import environment
from bitcpm_megatron.launch.launcher.job import Job, read_stages
from bitcpm_megatron.launch.launcher.network import choose_interface, interfaces
from bitcpm_megatron.launch.launcher.scheduler import Placement, place_of
from bitcpm_megatron.launch.launcher.supervisor import Supervisor
from bitcpm_megatron.launch.launcher.torchrun import environment as child_environment
from bitcpm_megatron.launch.launcher.torchrun import is_finished, next_stage, resume, torchrun


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
    jobs = read_stages(args.job, args.set)
    first, cluster = jobs[0], jobs[0].cluster
    places = [place_of(job, os.environ, args.node_rank) for job in jobs]
    place, interface = places[0], choose_interface(cluster)
    settings = environment.resolve(environment.read_profile(cluster.profile), cluster, os.environ, interface)
    for job in jobs:
        job.arguments()
    commands = [torchrun(job, at, _local_address(at, interface)) for job, at in zip(jobs, places, strict=True)]
    restarts = f", up to {cluster.max_restarts} restarts" if cluster.max_restarts else ""
    print(f"job: {first.name.removesuffix(f'-{first.stage}')}: {first.description}")
    print(
        f"cluster: {place.source}: node {place.node_rank} of {place.nodes}, {place.devices_per_node} processes each, "
        f"{cluster.rendezvous} rendezvous at {place.master_addr}:{place.master_port}{restarts}"
    )
    if interface is not None:
        print(f"network interface: {interface}")
    for note in place.notes:
        print(f"note: {note}")
    print(f"environment (profile {Path(cluster.profile).stem}):\n{environment.table(settings)}", flush=True)
    for number in range(len(jobs)) if args.print else ():
        _introduce(jobs, number, commands[number])
    if args.print:
        return 0
    if args.preflight:
        from bitcpm_megatron.launch import preflight

        if status := preflight.report(jobs, places):
            return status
    variables = child_environment(os.environ, {s.name: s.value for s in settings})
    if first.stage is not None:
        return _in_turn(jobs, commands, variables)
    _introduce(jobs, 0, commands[0])
    os.execve(commands[0][0], commands[0], variables)


def _introduce(jobs: Sequence[Job], number: int, command: Sequence[str]) -> None:
    """Prints from which checkpoint a job, or a stage of it, starts, and its command."""
    job = jobs[number]
    stage = "" if job.stage is None else f"stage {job.stage} ({number + 1} of {len(jobs)}), "
    print(f"{stage}checkpoints: {resume(job).line}")
    print(f"command:\n  {display(command)}", flush=True)


def _in_turn(jobs: Sequence[Job], commands: Sequence[list[str]], variables: Mapping[str, str]) -> int:
    """Runs the stages that have not ended; returns the exit status."""
    with Supervisor() as supervisor:
        while (job := next_stage(jobs)) is not None:
            _introduce(jobs, job.number, commands[job.number])
            status = supervisor.run(commands[job.number], variables)
            if status < 0:
                raise cli.FailedError(f"the agent of stage {job.stage} ended by {signal.Signals(-status).name}")
            if status or not is_finished(job):
                print(f"stage {job.stage} has not ended: the same command goes on from here", flush=True)
                return status
            print(f"stage {job.stage} has ended", flush=True)
            if supervisor.asked:
                print("asked to stop: the same command goes on from here", flush=True)
                return cli.DONE
    print("every stage has ended", flush=True)
    return cli.DONE


def display(command: Sequence[str]) -> str:
    """Returns a command as quoted text for people, one flag with its values per line."""
    lines: list[list[str]] = [[]]
    for part in command:
        if part.startswith("--") or part.endswith(".py"):
            lines.append([])
        lines[-1].append(shlex.quote(part))
    return " \\\n    ".join(" ".join(line) for line in lines if line)


def _local_address(place: Placement, interface: str | None) -> str | None:
    """Returns how others reach this node: by an address of the chosen interface, else its entry among the hosts."""
    if interface is not None:
        addresses = interfaces().get(interface, [])
        return next(iter(sorted(addresses, key=lambda address: ":" in address)), None)
    return place.hosts[place.node_rank] if place.hosts else None


if __name__ == "__main__":
    sys.exit(main())
