# SPDX-License-Identifier: Apache-2.0
"""Benchmark of ternary training against BF16: time and memory, with the steps of both interleaved in one job.

    python benchmarks/throughput.py                               # on a CPU: the standard comparison, 20 to 30 minutes
    python benchmarks/throughput.py --model minicpm4-0.5b --layouts TP1 TP2xDP4 --seq-length 4096 --micro-batches 1 8
    python benchmarks/throughput.py --peers                       # other quantizers inside the same linear layers
    python benchmarks/throughput.py --host megatron-lm --megatron-path DIR [--mindspeed-path DIR] ...

All variants have the same model, layout and data. ``--host`` measures an unmodified ``pretrain_gpt.py``, which is also
the way to measure an NPU: BF16 and ternary jobs run in turn, and log their times per iteration.

Ratios are medians over pairs of steps, with a 95 % interval that is valid for every distribution if the pairs of a job
are independent. The benchmark writes ``throughput.csv``, ``throughput.png`` and ``throughput.md``, and prints the
tables.

Exit status: 0 done, 1 a job failed, 2 bad arguments.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hardware import best_device, check_outputs, command_line
from steps import host_jobs, processes, report
from steps.layouts import Layout
from steps.plan import BASELINE, MODES, PROGRESS, RECOMPUTE, RESIDENT, Job, asked, model_flags, standard, ternary_flags
from steps.variants import PEERS, VARIANTS
from tqdm import tqdm

from bitcpm_megatron import cli
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.models.architecture import MAX_LAYERS
from bitcpm_megatron.ops import backends
from bitcpm_megatron.ternary_flags import GroupSize
from bitcpm_megatron.training.flags import parse_args

# By default glibc returns freed memory to the system and maps fresh pages for the next tensor, irregularly and in any
# variant, which takes up to a fifth of a step. With these settings all variants keep their memory.
STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
JOB = Path(__file__).with_name("throughput_job.py")
# Largest number of processes that share a core: with more, only the scheduler would be measured.
_PER_CORE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements that the command line describes, and returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    return cli.run(lambda: _measure(args, command_line("throughput", argv)))


def _measure(args: argparse.Namespace, command: str) -> None:
    check_outputs(args.output_dir)
    if args.host is not None:
        rows = host_jobs.measure(args)
    else:
        jobs = jobs_of(args)
        for job in jobs:
            # Contradictory flags are reported here, once, instead of by every rank of a job hours later.
            for variant in job.variants:
                parse_args([*job.arguments(), *job.flags_of(variant)], job.layout.processes)
        rows = measure(jobs, args.peak_tflops)
    report.write(rows, args.output_dir, args.name, command)
    line = report.last_line(rows)
    if line is not None:
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = cli.Whole(1, 2**24)
    names = [b.name for b in backends()]
    parser.add_argument(
        "--model", choices=["0.5b-layers", *presets.names()], help="default 0.5b-layers, on a GPU minicpm4-0.5b"
    )
    parser.add_argument("--num-layers", type=cli.Whole(1, MAX_LAYERS), help="instead of the model's")
    parser.add_argument("--vocab-size", type=size, help="instead of the model's; default of 0.5b-layers 2048")
    parser.add_argument("--layouts", nargs="+", metavar="TP2xPP2xDP1", help="add +SP, +DO (distributed optimizer)")
    parser.add_argument("--context-parallel-size", type=cli.Whole(1, 2**16), metavar="N", help="of all layouts")
    parser.add_argument(
        "--packed", action="store_true", help="documents of 1/2, 1/4, 1/8 and 1/8 of a sequence, each by itself"
    )
    parser.add_argument("--seq-length", type=size, help="default 256, on a GPU 4096")
    parser.add_argument(
        "--micro-batch-size", type=size, nargs="+", help="sequences; tokens are this times --seq-length"
    )
    parser.add_argument("--micro-batches", type=size, nargs="+", help="per step, default 1 8")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), help=f"default {' '.join(MODES)}")
    parser.add_argument("--peers", action="store_true", help="all peers that are installed, beside bf16 and resident")
    parser.add_argument("--recompute", nargs="+", choices=sorted(RECOMPUTE), help="default none")
    parser.add_argument(
        "--pairs", type=cli.Whole(1, 10**6), help="of steps, default 40; with --host of jobs, default 6"
    )
    parser.add_argument("--group-size", type=GroupSize(), default=-1)
    parser.add_argument("--backend", choices=["auto", *names], default="auto", help="of the quantizer")
    parser.add_argument("--host", choices=("megatron-lm",), help="instead of our own training loop")
    parser.add_argument("--megatron-path", help="a checkout, with --host")
    parser.add_argument("--mindspeed-path", help="a checkout, with --host")
    parser.add_argument(
        "--host-flags", default="", metavar="TEXT", help="of pretrain_gpt.py, more: --host-flags='--use-flash-attn ...'"
    )
    positive = cli.Number(0, 1e9, open_minimum=True)
    parser.add_argument("--peak-tflops", type=positive, help="of one device, for the MFU; known for A100, H100, H200")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", type=_name, default="throughput", help="of the files that are written")
    return parser


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Returns the jobs that the command line asks for; on a CPU without any flags, the standard comparison.

    Raises:
        ValueError: if variants cannot be compared, or this machine has too few devices for a layout.
    """
    shaping = ("model", "num_layers", "vocab_size", "layouts", "seq_length", "micro_batch_size", "micro_batches")
    shaping += ("variants", "recompute", "pairs", "context_parallel_size")
    if best_device() == "npu":
        raise ValueError("our own training loop knows no NPU: measure there with --host megatron-lm")
    if args.peers and args.variants:
        raise ValueError("--peers names the variants: leave --variants out, or name the peers there")
    on_cpu = not torch.cuda.is_available()
    if on_cpu and not args.peers and not args.packed and all(getattr(args, name) is None for name in shaping):
        return [replace(job, ternary=ternary_flags(args)) for job in standard(_peers(1))]
    variants = tuple(dict.fromkeys((BASELINE, *(args.variants or MODES))))
    if args.variants and BASELINE not in args.variants:
        raise ValueError(f"--variants {' '.join(args.variants)}: name {BASELINE} too, to which all are compared")

    def compared(layout: Layout) -> tuple[str, ...]:
        if not on_cpu and layout.processes > torch.cuda.device_count():
            raise ValueError(f"--layouts {layout} needs {layout.processes} GPUs, here are {torch.cuda.device_count()}")
        if on_cpu and layout.processes > _PER_CORE * os.cpu_count():
            raise ValueError(f"--layouts {layout} needs {layout.processes} processes, here are {os.cpu_count()} cores")
        chosen = (BASELINE, RESIDENT, *_peers(layout.tensor)) if args.peers else variants
        for name in chosen:
            reason = VARIANTS[name].unavailable(layout.tensor)
            if reason is not None:
                raise ValueError(f"--variants {name} at {layout}: {reason}")
        return chosen

    args.model = args.model or ("0.5b-layers" if on_cpu else "minicpm4-0.5b")
    return asked(args, model_flags(args.model, args.num_layers, args.vocab_size), compared, rounds=40)


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, . _ -")
    return text


def _peers(tensor_parallel: int) -> tuple[str, ...]:
    found = []
    for name in PEERS:
        reason = VARIANTS[name].unavailable(tensor_parallel)
        if reason is None:
            found.append(name)
        else:
            print(f"{name}: left out, {reason}", file=sys.stderr)
    return tuple(found)


def measure(jobs: Sequence[Job], peak_tflops: float | None = None) -> list[report.Row]:
    """Runs the jobs one after another, and returns their rows.

    Args:
        jobs: the jobs.
        peak_tflops: the peak of one device in TFLOP/s, for the utilization; None to take it from the device's name.

    Raises:
        FailedError: if a job fails.
    """
    rows = []
    # Progress is counted in tokens, because on one machine all layouts take about the same time per token.
    total = sum(job.micro_batches * job.tokens for job in jobs)
    with tqdm(total=total, unit="token", unit_scale=True) as progress:
        for job in jobs:
            progress.set_description(f"{job.layout} x {job.seq_length}")
            result = run(job, lambda micro_batches, tokens=job.tokens: progress.update(micro_batches * tokens))
            rows += report.rows_of(job, result, peak_tflops)
    return rows


def run(job: Job, on_step: Callable[[int], object] = lambda micro_batches: None) -> dict:
    """Runs a job's processes and returns the results that ``throughput_job.py`` writes.

    Args:
        job: the job.
        on_step: a function that is called after every step with the number of its micro-batches, whose sum is
            ``job.micro_batches``.

    Raises:
        FailedError: if the job fails; the message contains the end of its output.
    """
    plan = {
        "flags": {name: [*job.arguments(), *job.flags_of(name)] for name in job.variants},
        "costs": job.costs,
        "cost_micro_batches": job.cost_micro_batches,
        "sessions": [vars(session) for session in job.sessions],
    }

    def heard(line: str) -> None:
        if line.startswith(PROGRESS):
            on_step(int(line.removeprefix(PROGRESS)))

    with tempfile.TemporaryDirectory() as directory:
        written, results = Path(directory) / "plan.json", Path(directory) / "results.json"
        written.write_text(json.dumps(plan), encoding="utf-8")
        done = processes.run(job.layout.processes, JOB, [str(written), str(results)], STEADY_HEAP, heard)
        if done.returncode != 0 or not results.is_file():
            said = "".join(line for line in done.stdout.splitlines(True) if not line.startswith(PROGRESS))
            raise cli.FailedError(f"{job.layout} failed with status {done.returncode}:\n{said[-4000:]}")
        return json.loads(results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
