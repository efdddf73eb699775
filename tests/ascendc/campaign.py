# SPDX-License-Identifier: Apache-2.0
"""``make kernel-test``: runs every case on the emulated kernels, then every mutant until a case catches it.

In between, all quantizers are run on many values each (``values.py``). The last line is "kernel: N cases ok, M/K
mutants caught". The command fails if a case fails, if fewer than 95 % of the mutants are caught, or if
survivors.txt gives no reason for a survivor.
"""

import argparse
import ctypes
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from ascendc import cases, values
from ascendc.emulator import SOURCES, Counters, EmulationError, Emulator, Weight, build
from ascendc.mutants import Mutant, generate

SURVIVORS = Path(__file__).parent / "survivors.txt"
ENOUGH = 0.95
CPU_SECONDS = 15
MUTANT_FLAGS = "-std=c++17 -O2 -fPIC -ffp-contract=off -fvisibility=default -w -DTERNARY_MUTANTS".split()
KINDS = "planted barrier queue call constant arithmetic comparison condition rounding operands".split()


@dataclass
class Expected:
    """A launch and its expected results, as (index of the weight, name of the tensor, bytes)."""

    weights: list[Weight]
    cores: int
    late: bool
    results: list[tuple[int, str, bytes]]
    counters: tuple[int, ...]


def run_cases(emulator: Emulator, chosen: Iterable[list[cases.Case]]) -> list[Expected]:
    """Runs launches of one or several weights, checks them against torch, and returns their results.

    Raises:
        AssertionError: if a case fails.
    """
    done = []
    for group in chosen:
        case = group[0]
        try:
            if len(group) == 1:
                weight, counters = cases.run(emulator, case)
                weights = [weight]
            else:
                weights, counters = cases.run_grouped(emulator, group)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{group}: {error}") from error
        results = [
            (i, name, bytes(_raw(getattr(weight, name))))
            for i, weight in enumerate(weights)
            for name in ("quantized", "packed", "statistics", *([] if weight.given else ["scales"]))
            if getattr(weight, name) is not None
        ]
        done.append(Expected(weights, case.cores, case.late, results, _kept(counters)))
    return done


def _kept(counters: Counters) -> tuple[int, ...]:
    return counters.read_bytes, counters.written_bytes, counters.ub_bytes


def all_launches() -> list[list[cases.Case]]:
    """Returns every launch: each case by itself, then the grouped cases."""
    return [*([case] for case in cases.all_cases()), *cases.grouped_cases()]


def _raw(tensor: torch.Tensor) -> ctypes.Array:
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr())


def verdict(emulator: Emulator, expected: Iterable[Expected]) -> str:
    """Returns the name of the check that catches the chosen mutant, or "" if none does."""
    for item in expected:
        for i, name, content in item.results:
            ctypes.memset(getattr(item.weights[i], name).data_ptr(), 0xEE, len(content))  # run() clears statistics
        try:
            counters = emulator.run(item.weights, item.cores, item.late)
        except EmulationError as error:
            return str(error).split("]")[0].removeprefix("[")
        if any(bytes(_raw(getattr(item.weights[i], name))) != content for i, name, content in item.results):
            return "result"
        if _kept(counters) != item.counters:
            return "counters"
    return ""


class MutantRun:
    """The mutants of one build, each run in a process of its own because it may crash or never end."""

    def __init__(self, expected: list[Expected]) -> None:
        with tempfile.TemporaryDirectory() as work:
            self.mutants, self.fixed = generate(SOURCES, Path(work))
            self._emulator = Emulator(build(Path(work), MUTANT_FLAGS))
        self._chosen = ctypes.c_int32.in_dll(self._emulator._library, "ternary_mutant")
        self._expected = expected
        if self._try(-1) or self._try(-1):
            raise AssertionError("the build with all mutants switched off is not the kernel")

    def _try(self, number: int) -> str:
        self._chosen.value = number
        return verdict(self._emulator, self._expected)

    def run(self, mutants: list[Mutant], jobs: int) -> dict[Mutant, str]:
        """Returns the name of the check that catches each mutant; "" for survivors."""
        found: dict[Mutant, str] = {}
        running: dict[int, tuple[Mutant, int]] = {}
        waiting = list(reversed(mutants))
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                reader, writer = os.pipe()
                child = os.fork()
                if child == 0:
                    self._child(mutant, writer)
                os.close(writer)
                running[child] = (mutant, reader)
            child, status = os.wait()
            mutant, reader = running.pop(child)
            with os.fdopen(reader) as pipe:
                said = pipe.read()
            if os.WIFSIGNALED(status):
                said = "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "crash"
            found[mutant] = said
        return found

    def _child(self, mutant: Mutant, writer: int) -> None:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(writer, self._try(mutant.number).encode())
        finally:
            os._exit(0)


def reasons() -> dict[str, str]:
    """Reads why known survivors survive, by the mutant's key.

    In the file, a line with a reason in brackets is followed by the keys that it explains, one per line.
    """
    known, reason = {}, ""
    for line in SURVIVORS.read_text().splitlines():
        if line.startswith("["):
            reason = line.strip("[]")
        elif line.strip() and not line.startswith("#"):
            known[line.strip()] = reason
    return known


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=0, help="only so many, chosen at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(1)

    expected = run_cases(Emulator(), all_launches())
    print(f"{len(expected)} cases ok", flush=True)
    fewest, ties = values.check_all(Emulator())
    quantizers = f"{len(values.quantizers())} spaces x statistics x multipliers"
    print(f"{quantizers} ok on {fewest:,} values each, {ties:,} or more of them on a threshold", flush=True)
    order = random.Random(args.seed)
    order.shuffle(expected)
    run = MutantRun(expected)
    mutants = run.mutants
    if args.mutants:
        mutants = order.sample(mutants, args.mutants)
    print(f"{len(run.mutants)} mutants; {run.fixed} statements cannot be chosen at run time", flush=True)
    found = run.run(mutants, args.jobs)

    known = reasons()
    survivors = [m for m in mutants if not found[m]]
    report(found)
    unexplained = [m for m in survivors if m.key not in known]
    why = Tally(known[m.key] for m in survivors if m.key in known)
    for reason, count in why.most_common():
        print(f"  {count:3d} survive: {reason}")
    for m in unexplained:
        print(f"unexplained survivor: {m.key}")
    keys = {m.key for m in run.mutants}
    stale = [k for k in known if k not in keys or any(m.key == k and found.get(m) for m in mutants)]
    for key in stale:
        print(f"survivors.txt explains a mutant that is caught or gone: {key}")
    caught = len(mutants) - len(survivors)
    print(f"kernel: {len(expected)} cases ok, {caught}/{len(mutants)} mutants caught")
    return 1 if unexplained or stale or caught < ENOUGH * len(mutants) else 0


def report(found: dict[Mutant, str]) -> None:
    """Prints a table of how many mutants of each kind each check caught."""
    checks = [c for c, _ in Tally(v for v in found.values() if v).most_common()]
    print(f"{'':12s}{'all':>6s}{'caught':>8s}  " + "  ".join(checks))
    for kind in KINDS:
        verdicts = [v for m, v in found.items() if m.kind == kind]
        if not verdicts:
            continue
        by = Tally(verdicts)
        cells = "  ".join(f"{by[c]:>{len(c)}d}" for c in checks)
        print(f"{kind:12s}{len(verdicts):6d}{len(verdicts) - by['']:8d}  {cells}")


if __name__ == "__main__":
    sys.exit(main())
