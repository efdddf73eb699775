# SPDX-License-Identifier: Apache-2.0
"""Trains every arm of a sweep with every seed, and writes one table: ``launch/sweep.py SWEEP.yaml``.

    python launch/sweep.py SWEEP.yaml --parallel 2       run what has not ended, two at a time
    python launch/sweep.py SWEEP.yaml --report-only      make the table and the picture again, run nothing
    python launch/sweep.py SWEEP.yaml --retry-failed     also run what has failed

``SWEEP.yaml`` is a sweep file (docs/sweeps.md has the schema) or the name of one in ``launch/sweeps``. After a kill or
a request to stop, the same command resumes the sweep. A run that has finished is never run again, whatever else in the
file changes. ``--output`` receives ``results.md``, ``results.json``, ``results.png``, and a directory for every run.
Exit status: 0 every run has finished (``--report-only``: the table is made), 1 some have not, 2 bad sweep or arguments.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.files import FileError, directory_mistake
from bitcpm_megatron.files.lock import FileLock, LockedError
from bitcpm_megatron.launch.sweeper import report
from bitcpm_megatron.launch.sweeper.inputs import Inputs
from bitcpm_megatron.launch.sweeper.results import results_of
from bitcpm_megatron.launch.sweeper.running import carry_out, variables_of
from bitcpm_megatron.launch.sweeper.runs import FAILED, FINISHED, UNFINISHED, Run, runs_of, strangers
from bitcpm_megatron.launch.sweeper.sweep_file import Sweep, read_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sweep, or reports on it; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP.yaml")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default runs/NAME, of the sweep file's name")
    parser.add_argument("--parallel", type=cli.Whole(1, 1024), metavar="N", help="runs at a time, default 1")
    parser.add_argument("--report-only", action="store_true", help="make the table and the picture again, run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="also run what has failed before")
    args = parser.parse_args(argv)
    if args.report_only and (args.retry_failed or args.parallel is not None):
        parser.error("--report-only runs nothing: leave out --parallel and --retry-failed")
    return cli.run(lambda: _sweep(args))


def _sweep(args: argparse.Namespace) -> None:
    sweep = read_sweep(args.sweep)
    output = args.output or Path("runs") / sweep.path.stem
    if mistake := directory_mistake(output):
        raise FileError(f"--output {output}: {mistake}")
    if args.report_only and not output.is_dir():
        raise FileError(f"--output {output}: nothing of this sweep has run there, leave out --report-only")
    inputs = Inputs.recorded(output) if args.report_only else Inputs()
    runs = runs_of(sweep, output, inputs)
    variables = {} if args.report_only else variables_of(sweep.base)
    lock = _lock(output)
    try:
        if not args.report_only:
            inputs.record(output)
        asked = not args.report_only and _run(sweep, runs, output, variables, args)
        results = results_of(sweep, runs)
        report.write(results, output)
    finally:
        lock.release()
    print("\n".join(report.arms(results)))
    print(f"table: {output / report.TABLE}; picture: {output / report.PICTURE}; data: {output / report.DATA}")
    failed, left = results.count(FAILED), results.count(UNFINISHED)
    if not args.report_only and (failed or left):
        why = f"{'asked to stop: ' if asked else ''}of {len(runs)} runs {left} have not ended, and {failed} have failed"
        raise cli.FailedError(
            f"{why}: the same command goes on with the first, with --retry-failed also with the others"
        )


def _lock(output: Path) -> FileLock:
    try:
        return FileLock(output / ".lock")
    except LockedError as error:
        raise FileError(
            f"--output {output} is that of a sweep that runs now ({error.holder}): wait for it, or end it"
        ) from None


def _run(
    sweep: Sweep, runs: Sequence[Run], output: Path, variables: Mapping[str, str], args: argparse.Namespace
) -> bool:
    """Carries out the remaining runs; returns whether the sweep was asked to stop."""
    states = [run.result(sweep.last_records).state for run in runs]
    again = (UNFINISHED, FAILED) if args.retry_failed else (UNFINISHED,)
    left = [run for run, state in zip(runs, states, strict=True) if state in again]
    print(
        f"{len(runs)} runs of {len(sweep.arms)} arms: {states.count(FINISHED)} have finished, "
        f"{states.count(FAILED)} have failed, {len(left)} are to be run",
        flush=True,
    )
    if others := strangers(runs, output):
        print(f"note: {output} holds {others} runs that this file does not name; they are left alone", flush=True)
    at_once = args.parallel or 1
    return carry_out(
        left, variables, at_once, sweep.last_records, lambda: report.write(results_of(sweep, runs), output)
    )


if __name__ == "__main__":
    sys.exit(main())
