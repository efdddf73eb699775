# SPDX-License-Identifier: Apache-2.0
"""Runs the numeric and distributed tests as other processors would, varying one factor at a time from the default.

    python tests/portable_campaign.py [--sample] [--settings WORD ...] [--jobs N]

The factors are the instructions that torch's own kernels use, those that oneDNN uses, those that the C kernel is
compiled for, and the number of threads. Before any test runs, processes of each setting report what they really use,
both as a test and as a rank that a test launches. A setting that is not in force is a failure; a setting that this
processor lacks is not offered. Exit status: 0 all settings passed, 1 some did not.

``--sample`` runs all settings on a few fast files that depend on the processor most: the C kernel and its reference,
packed and fused weights, activations, telemetry, and the layer's gradients on two ranks.
"""

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

from bitcpm_megatron import cli

# Tests run with the variables of DEFAULT and those of their setting; values of CLEARED from outside are removed.
DEFAULT = {"OMP_NUM_THREADS": "1"}
CLEARED = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"),
    *(
        "MKL_NUM_THREADS",
        "MKL_ENABLE_INSTRUCTIONS",
        "OMP_NUM_THREADS",
        "BITCPM_MARCH",
        "BITCPM_CACHE_DIR",
        "PYTHONPATH",
    ),
)
AVX512 = r"Intel AVX-512 .*|Intel AVX10.*"
"""A regular expression for oneDNN's names of AVX-512 and everything beyond it."""
GROUPS = {
    "unit": [
        f"tests/unit/test_{name}.py"
        for name in (
            *("quantizer", "op", "cpu_backend", "fused", "packing", "activations", "int8", "telemetry"),
            *("packed_linear", "ternary_linears", "use", "round_trip", "models", "modeling_bitcpm"),
        )
    ],
    "gradients": ["tests/distributed/test_gradients.py"],
    "runs": ["tests/distributed/test_runs.py"],
    "layouts": ["tests/distributed/test_layouts.py"],
}
SAMPLE = {
    "sample": [
        *(
            f"tests/unit/test_{name}.py"
            for name in ("cpu_backend", "fused", "packing", "activations", "int8", "telemetry")
        ),
        "tests/distributed/test_gradients.py",
    ]
}
LONGEST = 3600.0
"""The number of seconds after which a group of files counts as failed."""


@dataclass(frozen=True)
class Setting:
    """A setting that differs from the default in one factor.

    Args:
        name: the name that is printed.
        variables: the environment variables that make the setting.
        expected: by fact, a regular expression that must match all of what processes then report.
        needs: by fact, a regular expression for what processes report without the setting if this processor has it.
    """

    name: str
    variables: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    def complaint(self, facts: Mapping[str, str]) -> str:
        """Returns why the setting is not in force in a process that reports these facts; empty if it is."""
        wrong = [f"{k} is {facts[k]!r}, not {v!r}" for k, v in self.expected.items() if not re.fullmatch(v, facts[k])]
        return "; ".join(wrong)

    def lacking(self, facts: Mapping[str, str]) -> str:
        """Returns what this processor lacks, from the facts of a process without the setting; empty if nothing."""
        return "; ".join(f"{k} is {facts[k]!r}" for k, v in self.needs.items() if not re.fullmatch(v, facts[k]))


def _native() -> str:
    """Returns the widest instructions of -march=native here, or an expression that matches any if they are unknown."""
    if platform.machine() != "x86_64":
        return ".*"
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return "AVX-512" if "avx512f" in flags else "AVX" if "avx" in flags else "SSE"


def _torch(value: str, capability: str, needs: str) -> Setting:
    variables = {"ATEN_CPU_CAPABILITY": value}
    return Setting(f"ATEN_CPU_CAPABILITY={value}", variables, {"torch": capability}, {"torch": needs})


def _onednn(value: str, isa: str, needs: str) -> Setting:
    return Setting(f"ONEDNN_MAX_CPU_ISA={value}", {"ONEDNN_MAX_CPU_ISA": value}, {"oneDNN": isa}, {"oneDNN": needs})


SETTINGS = [
    Setting("default: 1 thread, -march=native", {}, {"threads": "1", "C kernel": _native()}),
    _torch("default", "DEFAULT", ".*"),
    _torch("avx2", "AVX2", "AVX2|AVX512"),
    _onednn("AVX2", "Intel AVX2", f"Intel AVX2.*|{AVX512}"),
    _onednn("AVX512_CORE", "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions", AVX512),
    _onednn("AVX512_CORE_AMX", ".* AMX with bfloat16 and 8-bit integer support", ".* AMX .*"),
    Setting("2 threads", {"OMP_NUM_THREADS": "2"}, {"threads": "2"}),
    Setting("-march=x86-64-v2", {"BITCPM_MARCH": "x86-64-v2"}, {"C kernel": "SSE"}, {"machine": "x86_64"}),
]


def observe() -> dict[str, str]:
    """Returns what this process uses; oneDNN prints its part to standard output if ``ONEDNN_VERBOSE=1``."""
    import torch

    from bitcpm_megatron.ops import cpu

    torch.randn(8, 8).to_mkldnn()
    torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16()
    facts = {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }
    library, why = cpu.load()
    facts["C kernel"] = why or _instructions(library._name)
    return facts


def _instructions(library: str) -> str:
    """Returns the widest instructions in a compiled library."""
    code = subprocess.run(["objdump", "--disassemble", library], capture_output=True, text=True, check=True).stdout
    if "%zmm" in code:
        return "AVX-512"
    return "AVX" if re.search(r"%ymm|\sv[a-z0-9]+\s.*%xmm", code) else "SSE"


def observed(variables: Mapping[str, str], cache: Path, as_rank: bool = False) -> dict[str, str]:
    """Returns what a process with these variables uses, as a test or as a rank that a test launches.

    Raises:
        FailedError: if the process does not report it.
    """
    command = [sys.executable, __file__, "--observe", "rank" if as_rank else "test"]
    more = {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run(command, env=environment(variables, cache) | more, capture_output=True, text=True)
    if done.returncode != 0:
        raise cli.FailedError(f"a process with {dict(variables)} does not say what it uses:\n{done.stderr[-2000:]}")
    verbose = done.stdout.splitlines()
    facts = json.loads(next(line for line in verbose if line.startswith("{")))
    isa = [line.partition("cpu,isa:")[2] for line in verbose if "cpu,isa:" in line]
    products = [line.split(",")[6] for line in verbose if ",exec,cpu,matmul," in line]
    return facts | {"oneDNN": isa[0] if isa else "silent", "bf16 product": products[0] if products else "not oneDNN's"}


def environment(variables: Mapping[str, str], cache: Path) -> dict[str, str]:
    """Returns the environment of a setting's processes, which store what they compile in a folder of their own."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return kept | DEFAULT | {"BITCPM_CACHE_DIR": str(cache)} | dict(variables)


def proof(setting: Setting, cache: Path) -> tuple[str, dict[str, str]]:
    """Returns what is wrong with the processes of a setting (empty if nothing), and what a test in it uses."""
    facts = observed(setting.variables, cache)
    complaints = {
        "of a test": setting.complaint(facts),
        "of a rank": setting.complaint(observed(setting.variables, cache, as_rank=True)),
    }
    return "; ".join(f"{who}: {words}" for who, words in complaints.items() if words), facts


class Campaign:
    """A campaign: every setting runs the tests of several groups of files.

    Args:
        groups: the files of each group by its name, or other arguments of pytest.
        jobs: the number of groups that run at the same time.
        scratch: an empty directory for compiled code and the output of tests.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], jobs: int, scratch: Path) -> None:
        self._groups, self._jobs, self._scratch = groups, jobs, scratch
        self._began = time.monotonic()
        self._seconds: dict[str, list[float]] = {name: [] for name in groups}
        self._left: list[str] = []
        self._lock = threading.Lock()
        self.failed: set[str] = set()

    def run(self, settings: Sequence[Setting]) -> bool:
        """Runs the campaign and prints its last line; returns whether all settings that are offered passed."""
        usual = observed({}, self._cache("usual"))
        self._say("this processor, by default: " + ", ".join(f"{k}: {v}" for k, v in usual.items()))
        offered = []
        for setting in settings:
            if why := setting.lacking(usual):
                self._say(f"not offered here: {setting.name} ({why})")
            else:
                offered.append(setting)
        self._left = [group for _ in offered for group in self._groups]
        pool = ThreadPoolExecutor(self._jobs)
        try:
            good = list(pool.map(self._prove, offered))
            # Groups with the most ranks run first, so that no process works alone at the end.
            proved = itertools.compress(offered, good)
            wait([pool.submit(self._guarded, s, group) for s in proved for group in reversed(self._groups)])
        finally:
            pool.shutdown(cancel_futures=True)
        passed = len(offered) - len(self.failed)
        ending = f", {len(self.failed)} failed" if self.failed else ""
        print(
            f"portable: {passed} settings passed, {len(settings) - len(offered)} not offered here{ending}", flush=True
        )
        return not self.failed

    def _prove(self, setting: Setting) -> bool:
        complaint, facts = proof(setting, self._cache(setting.name))
        if complaint:
            with self._lock:
                self.failed.add(setting.name)
                for group in self._groups:
                    self._left.remove(group)
            self._say(f"FAILED: {setting.name} is not in force: {complaint}")
            return False
        told = ", ".join(f"{k}: {facts[k]}" for k in (*setting.expected, "bf16 product"))
        self._say(f"in force: {setting.name} ({told})")
        return True

    def _guarded(self, setting: Setting, group: str) -> None:
        """Runs a group; a fault of the campaign itself fails the setting, because the pool would not report it."""
        try:
            self._test(setting, group)
        except Exception as error:
            with self._lock:
                self.failed.add(setting.name)
            self._say(f"FAILED: {setting.name}: {group}: {error!r}")

    def _test(self, setting: Setting, group: str) -> None:
        log = self._scratch / f"{_word(setting.name)}-{group}.txt"
        scratch = self._scratch / f"tests-{_word(setting.name)}-{group}"
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
        began = time.monotonic()
        with log.open("w") as output:
            status = subprocess.run(
                [*command, *self._groups[group]],
                cwd=CHECKOUT,
                env=environment(setting.variables, self._cache(setting.name)),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LONGEST,
            ).returncode
        text = log.read_text(errors="replace")
        closing = (text.splitlines() or ["said nothing"])[-1]
        with self._lock:
            self._seconds[group].append(time.monotonic() - began)
            self._left.remove(group)
            good = status == 0 and " passed" in closing
            if not good:
                self.failed.add(setting.name)
        self._say(
            f"{'passed' if good else 'FAILED'}: {setting.name}: {group}: {closing.strip('= ')}{self._remaining()}"
        )
        if good:
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            ids = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            for line in ids or text.splitlines()[-20:]:
                self._say(f"    {line}")
            self._say(f"    everything it printed: {log}")

    def _remaining(self) -> str:
        """Returns the estimated time left: a group takes its mean time in other settings, or the mean of all groups."""
        with self._lock:
            known = [seconds for many in self._seconds.values() for seconds in many]
            mean = {group: sum(many) / len(many) for group, many in self._seconds.items() if many}
            left = sum(mean.get(group, sum(known) / len(known)) for group in self._left) / self._jobs
        return f"; about {left / 60:.0f} min left" if self._left else ""

    def _cache(self, name: str) -> Path:
        return self._scratch / f"cache-{_word(name)}"

    def _say(self, words: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {words}", flush=True)


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


def campaign(
    settings: Sequence[Setting], groups: Mapping[str, Sequence[str]], jobs: int, scratch: Path | None = None
) -> int:
    """Runs a campaign and returns the exit status; the tests' output is kept if one fails."""
    directory = Path(tempfile.mkdtemp(prefix="portable-", dir=scratch))
    good = Campaign(groups, jobs, directory).run(settings)
    if good:
        shutil.rmtree(directory)
    return cli.DONE if good else cli.FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the campaign."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sample", action="store_true", help="all settings on a few files: under 5 minutes on 2 cores")
    parser.add_argument("--settings", nargs="+", metavar="WORD", help="only those with such a word in their name")
    parser.add_argument(
        "--jobs", type=cli.Whole(1, 64), default=2, help="groups of files at the same time (default: 2)"
    )
    parser.add_argument("--observe", choices=("test", "rank"), help="say what this process uses, and nothing else")
    args = parser.parse_args(argv)
    if args.observe == "rank":
        from support.launcher import environment as of_ranks

        os.execve(sys.executable, [sys.executable, __file__, "--observe", "test"], of_ranks())
    if args.observe:
        print(json.dumps(observe()))
        return cli.DONE
    chosen = [s for s in SETTINGS if not args.settings or any(word in s.name for word in args.settings)]
    if not chosen:
        raise ValueError(f"--settings: no setting has such a word in its name: {', '.join(s.name for s in SETTINGS)}")
    return campaign(chosen, SAMPLE if args.sample else GROUPS, args.jobs)


if __name__ == "__main__":
    sys.exit(cli.run(main))
