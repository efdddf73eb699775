# SPDX-License-Identifier: Apache-2.0
"""BF16 against ternary under an unmodified Megatron-LM, with or without MindSpeed: whole jobs in turn.

A host's process holds one model, so that steps cannot be interleaved: jobs are, and each gives the median of its
iterations after the first few. A ratio needs two jobs next to each other in time.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from layouts import Layout
from plan import BASELINE, OURS, RECOMPUTE, Job, Session
from throughput_report import Row, rows_of
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[1]
ITERATIONS, WARM_UP = 15, 5
_PATTERN = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
# Its fused kernels, communicators and data need CUDA; docs/hosts.md.
_ON_CPU = """
    --distributed-backend gloo --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion --transformer-impl local
""".split()
_LOGGING = f"""
    --tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 1000000
    --log-interval 1 --train-iters {ITERATIONS}
""".split()


class HostError(Exception):
    """A job that failed, or that logged no times."""


def measure(args: argparse.Namespace, model: str, flags: tuple[str, ...]) -> list[Row]:
    """Runs the jobs that the command line asks for.

    Args:
        args: of ``throughput.py``.
        model: name in the table.
        flags: of the model.

    Raises:
        HostError: a job failed.
        ValueError: something that hosts are not measured with.
    """
    if args.peers or args.variants:
        raise ValueError("--host compares bf16 and ternary: leave --peers and --variants out")
    if args.megatron_path is None:
        raise ValueError("--host needs --megatron-path, a Megatron-LM checkout")
    accelerator = torch.cuda.is_available() or hasattr(torch, "npu")
    rounds = args.pairs or 6
    jobs = [
        Job(
            model,
            flags,
            Layout.parse(layout),
            args.seq_length or (4096 if accelerator else 256),
            size,
            recompute,
            (Session((BASELINE, OURS), n, rounds),),
            (),
        )
        for layout in args.layouts or ["TP1"]
        for size in args.micro_batch_size or [1]
        for recompute in args.recompute or ["none"]
        for n in args.micro_batches or (1, 8)
    ]
    rows = []
    with tqdm(total=2 * rounds * len(jobs), unit="job") as progress:
        for job in jobs:
            seconds: dict[str, list[float]] = {BASELINE: [], OURS: []}
            for turn in range(rounds):
                for variant in (BASELINE, OURS) if turn % 2 == 0 else (OURS, BASELINE):
                    progress.set_description(f"{job.layout} {variant}")
                    seconds[variant].append(_median_seconds(args, job, variant, accelerator))
                    progress.update()
            rows += rows_of(job, _results(job, seconds), args.peak_tflops)
    return rows


def _results(job: Job, seconds: dict[str, list[float]]) -> dict:
    (session,) = job.sessions
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "npu" if hasattr(torch, "npu") else "cpu"
    measured = {**vars(session), "seconds": [seconds[v] for v in session.variants], "quantizer": {}, "traffic": {}}
    return {"sessions": [measured], "costs": {}, "notes": {}, "device": device}


def command(args: argparse.Namespace, job: Job, variant: str, accelerator: bool) -> list[str]:
    """The torchrun command of one job."""
    (session,) = job.sessions
    batch = session.micro_batches * job.micro_batch_size * job.layout.data
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc_per_node", str(job.layout.processes), str(CHECKOUT / "launch" / "pretrain_gpt.py")]
    line += ["--megatron-path", args.megatron_path]
    line += ["--mindspeed-path", args.mindspeed_path] if args.mindspeed_path else []
    line += [*job.flags, *job.layout.flags(), *RECOMPUTE[job.recompute], "--bf16", "--mock-data"]
    line += ["--seq-length", str(job.seq_length), "--max-position-embeddings", str(job.seq_length)]
    line += ["--micro-batch-size", str(job.micro_batch_size), "--global-batch-size", str(batch)]
    line += [*_LOGGING, "--lr", "1e-4", "--lr-decay-style", "constant", *([] if accelerator else _ON_CPU)]
    if variant == OURS:
        line += ["--ternary", "--ternary-group-size", str(args.group_size), "--ternary-backend", args.backend]
    return line + args.host_flags.split()


def _median_seconds(args: argparse.Namespace, job: Job, variant: str, accelerator: bool) -> float:
    threads = max(1, len(os.sched_getaffinity(0)) // job.layout.processes)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
    }
    line = command(args, job, variant, accelerator)
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    times = [float(found) / 1e3 for found in _PATTERN.findall(done.stdout)]
    if done.returncode != 0 or len(times) != ITERATIONS:
        raise HostError(f"{job.layout} {variant} failed with status {done.returncode}:\n{done.stdout[-4000:]}")
    return statistics.median(times[WARM_UP:])
