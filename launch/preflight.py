# SPDX-License-Identifier: Apache-2.0
"""Checks a job before it occupies any device: ``launch/preflight.py JOB.yaml``, on a login node or a node of the job.

    python launch/preflight.py JOB.yaml [--json] [--node-rank N] [--set section.key=value]

Prints a table of pass / warn / fail, each line with the finding and, if something has to be done, the cure. A job with
stages has one table for each stage. Nothing is written, no device is touched and no other node is contacted.

Exit status: 0 no failure (warnings allowed), 2 a job file that cannot be understood, 3 something fails.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.launch.checks import checkpoint, cluster, data, layout, software, stages, teacher, training
from bitcpm_megatron.launch.checks.subject import Finding, Subject, in_turn
from bitcpm_megatron.launch.launcher.job import Job, read_stages
from bitcpm_megatron.launch.launcher.scheduler import Placement
from bitcpm_megatron.launch.launcher.torchrun import host_argv

_WIDTH = 116
# All findings of all checks about a subject.
findings = in_turn(
    cluster.check,
    layout.check,
    training.check,
    data.check,
    teacher.check,
    checkpoint.check,
    stages.check,
    software.check,
)


def main(argv: list[str] | None = None) -> int:
    """Checks one job; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", metavar="JOB.yaml")
    parser.add_argument("--json", action="store_true", help="for machines: every finding as an object")
    parser.add_argument("--node-rank", type=cli.Whole(0, 2**16), metavar="N", help="number of this node, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change the job file")
    args = parser.parse_args(argv)
    return cli.run(lambda: _check(args))


def _check(args: argparse.Namespace) -> int:
    jobs = read_stages(args.job, args.set)
    for job in jobs:
        host_argv(job)
    return report(jobs, [None] * len(jobs), args.node_rank, args.json)


def report(
    jobs: Sequence[Job], places: Sequence[Placement | None], node_rank: int | None = None, as_json: bool = False
) -> int:
    """Checks a job, or all its stages, on this node; prints the tables and returns the exit status.

    Args:
        jobs: the job, or its stages in order.
        places: this node's place in each of the jobs; None if it is not known yet.
        node_rank: the rank of this node as given on the command line.
        as_json: whether to print one JSON object instead of the tables.
    """
    found = [findings(Subject(job, at, node_rank=node_rank)) for job, at in zip(jobs, places, strict=True)]
    if as_json:
        of = [{} if job.stage is None else {"stage": job.stage} for job in jobs]
        listed = [{**stage, **vars(f)} for stage, fs in zip(of, found, strict=True) for f in fs]
        print(json.dumps({"job": str(jobs[0].path), "findings": listed}, indent=1), flush=True)
    else:
        print("\n\n".join(map(table, jobs, found)), flush=True)
    return max(map(status, found))


def status(found: list[Finding]) -> int:
    """Returns the exit status for some findings: 3 if any of them is a failure, else 0."""
    return 3 if any(f.status == "fail" for f in found) else 0


def table(job: Job, found: list[Finding]) -> str:
    """Returns the findings as a table for people: one line each, with the cure below it."""
    width = max(len(f.check) for f in found)
    lines = [f"preflight of {job.name} ({job.path})"]
    for f in found:
        head = f"{f.status.upper():4}  {f.check.ljust(width)}  "
        lines += textwrap.wrap(f.found, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
        margin = " " * len(head)
        lines += textwrap.wrap(f.cure, _WIDTH, initial_indent=f"{margin}-> ", subsequent_indent=f"{margin}   ")
    counts = {s: sum(f.status == s for f in found) for s in ("pass", "warn", "fail")}
    lines.append(f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failures")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
