# SPDX-License-Identifier: Apache-2.0
"""Comparison of BF16 and ternary under an unmodified Megatron-LM, with or without MindSpeed, by whole jobs in turn.

A process of the host holds only one model, so that steps cannot be interleaved. Instead, jobs run in turn, and each
yields the median of its iterations after the first few. A ratio is formed from two consecutive jobs.
"""

import argparse
import re
import statistics
from dataclasses import replace
from pathlib import Path

from hardware import best_device, machine
from tqdm import tqdm

from bitcpm_megatron.cli import FailedError
from steps import processes
from steps.plan import BASELINE, OURS, Job, asked, model_flags
from steps.report import Row, rows_of

_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt.py"
ITERATIONS, WARM_UP = 15, 5
_PATTERN = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
# Megatron-LM's fused kernels, communicators and data need CUDA, see docs/hosts.md; these flags replace them on a CPU.
_ON_CPU = """
    --distributed-backend gloo --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion --transformer-impl local
""".split()
_LOGGING = f"""
    --tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 1000000
    --log-interval 1 --train-iters {ITERATIONS}
""".split()


def measure(args: argparse.Namespace) -> list[Row]:
    """Runs the jobs that the command line of ``throughput.py`` asks for, and returns their rows.

    Raises:
        FailedError: if a job fails.
        ValueError: if a flag cannot be combined with ``--host``, or its checkout is missing.
    """
    accelerator = best_device() != "cpu"
    args.model = args.model or ("minicpm4-0.5b" if accelerator else "0.5b-layers")
    # The ids in Megatron-LM's mock data go up to 4,096 for every vocabulary.
    vocabulary = args.vocab_size or (8192 if args.model == "0.5b-layers" else None)
    if vocabulary is not None and vocabulary <= 4096:
        raise ValueError(f"--vocab-size {vocabulary}: the hosts' mock data needs more than 4096")
    flags = model_flags(args.model, args.num_layers, vocabulary)
    if args.peers or args.variants:
        raise ValueError("--host compares bf16 and ternary: leave --peers and --variants out")
    if args.packed:
        raise ValueError("--host: its mock data is one document; leave --packed out")
    if args.megatron_path is None:
        raise ValueError("--host needs --megatron-path, a Megatron-LM checkout")
    for flag, path, package in (
        ("--megatron-path", args.megatron_path, "megatron"),
        ("--mindspeed-path", args.mindspeed_path, "mindspeed"),
    ):
        if path is not None and not (Path(path) / package).is_dir():
            raise ValueError(f"{flag} {path}: holds no directory {package}/")
    jobs = asked(args, flags, lambda layout: (BASELINE, OURS), rounds=6)
    jobs = [replace(job, sessions=(session,)) for job in jobs for session in job.sessions]
    rows = []
    with tqdm(total=sum(2 * job.sessions[0].rounds for job in jobs), unit="job") as progress:
        for job in jobs:
            seconds: dict[str, list[float]] = {BASELINE: [], OURS: []}
            for turn in range(job.sessions[0].rounds):
                for variant in (BASELINE, OURS) if turn % 2 == 0 else (OURS, BASELINE):
                    progress.set_description(f"{job.layout} {variant}")
                    seconds[variant].append(_median_seconds(args, job, variant, accelerator))
                    progress.update()
            rows += rows_of(job, _results(job, seconds), args.peak_tflops)
    return rows


def _results(job: Job, seconds: dict[str, list[float]]) -> dict:
    (session,) = job.sessions
    device = best_device() if best_device() == "cpu" else machine(best_device())
    measured = {**vars(session), "seconds": [seconds[v] for v in session.variants], "counted": {}}
    return {"sessions": [measured], "costs": {}, "notes": {}, "device": device}


def command(args: argparse.Namespace, job: Job, variant: str, accelerator: bool) -> list[str]:
    """Returns the torchrun command of one job."""
    return processes.command(job.layout.processes, _SCRIPT, _arguments(args, job, variant, accelerator))


def _arguments(args: argparse.Namespace, job: Job, variant: str, accelerator: bool) -> list[str]:
    (session,) = job.sessions
    batch = session.micro_batches * job.micro_batch_size * job.layout.data
    line = ["--megatron-path", args.megatron_path]
    line += ["--mindspeed-path", args.mindspeed_path] if args.mindspeed_path else []
    # The flags have the same names in Megatron-LM as in our loop, and the last value of a repeated flag takes effect.
    line += [*job.arguments(), "--global-batch-size", str(batch), *_LOGGING, *([] if accelerator else _ON_CPU)]
    return [*line, *job.flags_of(variant), *args.host_flags.split()]


def _median_seconds(args: argparse.Namespace, job: Job, variant: str, accelerator: bool) -> float:
    done = processes.run(job.layout.processes, _SCRIPT, _arguments(args, job, variant, accelerator), {})
    times = [float(found) / 1e3 for found in _PATTERN.findall(done.stdout)]
    if done.returncode != 0 or len(times) != ITERATIONS:
        raise FailedError(f"{job.layout} {variant} failed with status {done.returncode}:\n{done.stdout[-4000:]}")
    return statistics.median(times[WARM_UP:])
