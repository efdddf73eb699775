# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of bad input, each in a process forked from this one, and judges how they end.

    cd tests && python -m bad_input.campaign [--sample 200] [--only TEXT] [--jobs N] [--report FILE]

The following are faults: a traceback, a crash, a hang, excessive memory, a success despite bad input, an exit status
other than the documented one, more than one error, a message that does not name what is wrong, the execution of code
in a file, and a changed input. Every good command line is run first, so that a refusal can only be caused by the
mistake of a case. Exit status: 0 no fault, 1 some.
"""

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ[_variable] = "1" if _variable != "TOKENIZERS_PARALLELISM" else "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm import tqdm

from bitcpm_megatron import cli
from bitcpm_megatron.files import digest
from bitcpm_megatron.patches import end_with_parent

from . import damage, world
from .cases import all_cases, good_lines
from .cases.case import Case
from .commands import COMMANDS, scripts

MEMORY = 3 * 2**30
"""The most resident bytes that a case may need; the parent, whose pages it inherits, has about 0.7e9."""
LONGEST_MESSAGE = 1200


@dataclass
class Outcome:
    """How a process ended.

    Attributes:
        status: the exit status, negative for a signal; None if the process did not end in time.
        output: its standard output and standard error.
        seconds: the time that it ran.
        memory: its peak resident memory in bytes.
    """

    status: int | None
    output: str
    seconds: float
    memory: int


def warm() -> None:
    """Imports all slow modules before the first fork; this must not start a thread."""
    import torch

    torch.set_num_threads(1)
    import bitcpm_megatron.inference.megatron_run
    import bitcpm_megatron.training.loop  # noqa: F401

    for command in COMMANDS.values():
        command.main()


class Runner:
    """Starts processes of cases, waits for them, and kills those that run longer than ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running: dict[int, tuple[Case, Path, float]] = {}

    def start(self, case: Case, folder: Path) -> None:
        """Forks a process that runs a case in a directory."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _child(case, folder, parent)
        self.running[pid] = (case, folder, time.monotonic())

    def wait(self) -> tuple[Case, Path, Outcome]:
        """Waits until a case ends or is killed, and returns it with its directory and its outcome."""
        while True:
            for pid, (case, folder, began) in list(self.running.items()):
                done, status, usage = os.wait4(pid, os.WNOHANG)
                hanging = not done and time.monotonic() - began > self.seconds
                if hanging:
                    _kill_group(pid)
                    _, _, usage = os.wait4(pid, 0)
                if done or hanging:
                    _kill_group(pid)
                    del self.running[pid]
                    code = None if hanging else os.waitstatus_to_exitcode(status)
                    text = (folder.parent / f"{folder.name}.output").read_text(errors="replace")
                    return case, folder, Outcome(code, text, time.monotonic() - began, usage.ru_maxrss * 1024)
            time.sleep(0.005)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _child(case: Case, folder: Path, parent: int) -> None:
    """Runs a case as the interpreter would, and exits from this process."""
    status = 70
    try:
        os.setsid()
        end_with_parent(parent)  # a case that hangs must end when the campaign ends
        os.chdir(folder)
        for target, name in ((0, os.devnull), (1, None), (2, None)):
            path = name or str(folder.parent / f"{folder.name}.output")
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), target)
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)
        os.environ.update(case.environment)
        cli._SECONDS_FOR_RANK_0 = 0.0
        tqdm._instances.clear()  # a command's bars would be drawn above the campaign's
        status = _carry_out(case)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _carry_out(case: Case) -> int:
    if case.call is None:
        return COMMANDS[case.command].call(list(case.argv)) or 0
    try:
        case.call()
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def manifest(folder: Path) -> dict[str, object]:
    """Returns the digests of a directory's files and the targets of its links, by relative path."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = digest(path)["xxh3_128"]
    return found


def faults(case: Case, outcome: Outcome, before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Returns a description of everything that is wrong with how a case ended."""
    found = []
    text = outcome.output
    if damage.MARKER in after:
        found.append("code was run")
    changed = [n for n in before if after.get(n) != before[n] and not n.startswith(case.writes)]
    if changed:
        found.append(f"an input was changed: {changed[:3]}")
    if outcome.memory > MEMORY:
        found.append(f"{outcome.memory / 2**30:.1f} GiB of memory")
    if outcome.status is None:
        return [*found, f"hangs: not done after {outcome.seconds:.0f} s"]
    if "Traceback (most recent call last)" in text:
        found.append("a traceback")
    if outcome.status < 0:
        found.append(f"killed by signal {-outcome.status}")
    elif outcome.status == 0:
        if not case.accepts:
            found.append("accepted in silence")
    elif outcome.status not in case.status:
        found.append(f"exit code {outcome.status}, expected {' or '.join(map(str, case.status))}")
    if outcome.status not in (0, None) and not found:
        found += _unclear(case, outcome)
    return found


def _unclear(case: Case, outcome: Outcome) -> list[str]:
    lines = outcome.output.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if outcome.status == 3 and case.command in ("preflight", "inspect_checkpoint") and len(errors) <= 1:
        message = outcome.output  # a report has findings that name what is wrong
    elif len(errors) != 1:
        return [f"{len(errors)} lines that begin with 'error: '"]
    else:
        message = "\n".join(lines[errors[0] :])
    if len(message) > LONGEST_MESSAGE and outcome.status != 3:
        return [f"a message of {len(message)} characters"]
    if case.says and not any(word in message for word in case.says):
        return [f"the message names none of {', '.join(dict.fromkeys(case.says))}"]
    return []


class Campaign:
    """A campaign: makes the world, runs cases in copies of it, and judges their outcomes."""

    def __init__(self, scratch: Path, jobs: int, seconds: float) -> None:
        self.scratch, self.jobs, self.seconds = scratch, jobs, seconds
        self.world = scratch / "world"
        self.runner = Runner(seconds)
        self.number = 0

    def build(self) -> None:
        """Makes the world and runs every good line in a copy of it.

        Raises:
            SystemExit: if a good line fails, because the outcomes of bad ones would prove nothing.
        """
        world.build(self.world, lambda name, argv: self._good(name, tuple(argv), self.world))
        for name, argv in good_lines():
            folder = self._copy()
            self._good(name, argv, folder)
            shutil.rmtree(folder)

    def _good(self, name: str, argv: tuple[str, ...], folder: Path) -> None:
        self.runner.start(Case("good", f"{name} {' '.join(argv)}", name, argv), folder)
        case, _, outcome = self.runner.wait()
        # The preflight may report warnings and failures on this machine; it must only not refuse the input.
        if outcome.status != 0 and not (name == "preflight" and outcome.status == 3):
            raise SystemExit(f"a good line fails with {outcome.status}: {case.name}\n{outcome.output[-3000:]}")
        (folder.parent / f"{folder.name}.output").unlink()

    def _copy(self) -> Path:
        self.number += 1
        return Path(shutil.copytree(self.world, self.scratch / f"case{self.number}", symlinks=True))

    def run(self, cases: list[Case]) -> dict[Case, tuple[list[str], Outcome]]:
        """Runs cases, several at the same time; returns the faults and the outcome of each."""
        results: dict[Case, tuple[list[str], Outcome]] = {}
        waiting = list(reversed(cases))
        befores: dict[Path, dict[str, object]] = {}
        tqdm.monitor_interval = 0  # its thread would not survive the fork
        bar = tqdm(total=len(cases), unit="case", mininterval=0.5 if sys.stderr.isatty() else 20, miniters=1)
        bad = 0
        while waiting or self.runner.running:
            while waiting and len(self.runner.running) < self.jobs:
                case = waiting.pop()
                folder = self._copy()
                if case.first:
                    self._alone(case, folder)
                if case.prepare is not None:
                    case.prepare(folder)
                befores[folder] = manifest(folder)
                self.runner.start(case, folder)
            case, folder, outcome = self.runner.wait()
            found = faults(case, outcome, befores.pop(folder), manifest(folder))
            results[case] = found, outcome
            if found:
                bad += 1
                bar.write(f"FAULT {case.name[:150]!r}: {'; '.join(found)}")
            shutil.rmtree(folder, ignore_errors=True)
            (folder.parent / f"{folder.name}.output").unlink()
            bar.set_postfix(faults=bad, refresh=False)
            bar.update()
        bar.close()
        return results

    def _alone(self, case: Case, folder: Path) -> None:
        """Runs a case's good command line before the damage, with a runner of its own."""
        apart = Runner(self.seconds)
        apart.start(Case("good", case.name, case.command, case.first), folder)
        _, _, outcome = apart.wait()
        assert outcome.status == 0, outcome.output[-3000:]
        (folder.parent / f"{folder.name}.output").unlink()


def sample(cases: list[Case], size: int, seed: int) -> list[Case]:
    """Returns about ``size`` cases: of each kind at least three, and else in proportion to the root of its size."""
    rng = random.Random(seed)
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    chosen = set()
    whole = sum(math.sqrt(len(members)) for members in kinds.values())
    for members in kinds.values():
        share = max(3, round(size * math.sqrt(len(members)) / whole))
        chosen.update(rng.sample([c.name for c in members], min(share, len(members))))
    return [case for case in cases if case.name in chosen]


def main() -> int:
    """Parses the command line, runs the campaign and prints what it found; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=cli.Whole(1), metavar="N", help="about so many cases, of every kind")
    parser.add_argument("--seed", type=cli.Whole(0), help="of the sample; another one each time")
    parser.add_argument("--only", metavar="TEXT", help="cases with this in their name or kind")
    parser.add_argument("--jobs", type=cli.Whole(1), default=os.cpu_count())
    parser.add_argument(
        "--seconds",
        type=cli.Number(1, 10**6),
        default=60.0,
        help="after which a case counts as hanging, default 60: a good line takes about two; more on a busy machine",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="every fault with its output")
    args = parser.parse_args()
    strangers = sorted(set(scripts()) - set(COMMANDS))
    if strangers:
        print(f"no good line for {', '.join(strangers)}: add one to tests/bad_input/commands.py", file=sys.stderr)
        return 1
    warm()
    with tempfile.TemporaryDirectory(prefix="bad-input-") as directory:
        campaign = Campaign(Path(directory), args.jobs, args.seconds)
        campaign.build()
        cases = all_cases(campaign.world)
        cases = [c for c in cases if args.only is None or args.only in c.name or args.only == c.kind]
        if not cases:
            parser.error(f"--only {args.only}: no case is called so, and no kind of them")
        if args.sample:
            seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
            cases = sample(cases, args.sample, seed)
            print(f"a sample of {len(cases)}: --sample {args.sample} --seed {seed}", flush=True)
        results = campaign.run(cases)
    return report(results, args.report)


def report(results: dict[Case, tuple[list[str], Outcome]], path: Path | None) -> int:
    """Prints counts and faults; returns the exit status."""
    bad = {case: found for case, (found, _) in results.items() if found}
    kinds = Counter(case.kind for case in results)
    wrong = Counter(case.kind for case in bad)
    for kind, count in kinds.items():
        print(f"{kind:24} {count:5} cases {wrong[kind]:5} faults")
    slow = sorted(results, key=lambda case: -results[case][1].seconds)[:3]
    print("slowest: " + ", ".join(f"{case.name[:60]!r} {results[case][1].seconds:.1f} s" for case in slow))
    if path is not None:
        parts = [
            f"=== {c.name}\n{' '.join(c.argv)}\n{'; '.join(f)}\n{results[c][1].output[-2500:]}\n"
            for c, f in bad.items()
        ]
        path.write_text("\n".join(parts))
    print(f"bad input: {len(results)} cases, {len(bad)} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
