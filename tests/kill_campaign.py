# SPDX-License-Identifier: Apache-2.0
"""Kills a training run at random moments, resumes it each time, and compares it with an uninterrupted one.

    python tests/kill_campaign.py [--kills 30] [--seconds 900] [--seed N]

The run saves after every step, so that most kills (SIGKILL to every process at once) fall into a save; every other
attempt saves asynchronously. After each kill the tracker must name a complete checkpoint. Once the kills are done the
run goes on to its end, and its losses must equal the uninterrupted ones bit for bit. Exit status: 0 ok, 1 not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent / "distributed")]

from launcher import environment
from small_model import MODEL, losses

from bitcpm_megatron.training.checkpoint_directory import latest
from bitcpm_megatron.training.metrics import METRICS

LONGEST = 6.0
"""Seconds from the first step of an attempt to its kill, at most: the first save of a process takes about two."""
FLAGS = "--tensor-model-parallel-size 2 --sequence-parallel --bf16 --ternary --eval-interval 10 --eval-iters 1".split()


def start(steps: int, directory: Path, *more: str) -> subprocess.Popen:
    """Starts the run on two ranks, logging into ``directory/log``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["launch/pretrain.py", *MODEL, *FLAGS, "--train-iters", str(steps), "--data-cache-path"]
    command += [str(directory.parent / "cache"), "--log-dir", str(directory / "log"), *more]
    output = open(directory.parent / "output.txt", "a")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=output, stderr=subprocess.STDOUT)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher, its workers, and what they started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def wait_until_training(process: subprocess.Popen, log: Path, deadline: float) -> None:
    """Returns when the run has logged a step since it was started, or has ended."""
    before = log.stat().st_mtime_ns if log.is_file() else 0
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.stat().st_mtime_ns > before:
            return
        time.sleep(0.02)


def campaign(kills: int, seconds: float, seed: int, directory: Path) -> int:
    """Runs the campaign; returns how many kills it made.

    Raises:
        AssertionError: a checkpoint was lost, or the resumed run differs.
    """
    steps = 8 * kills
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    whole, killed = directory / "whole", directory / "killed"
    whole.mkdir(parents=True)
    killed.mkdir()
    assert start(steps, whole).wait() == 0, (directory / "output.txt").read_text()[-4000:]
    save = ["--save", str(killed / "save"), "--load", str(killed / "save"), "--keep-last-n", "2"]
    often = [*save, "--save-interval", "1"]
    made = 0
    while made < kills and time.monotonic() < deadline:
        process = start(steps, killed, *often, *(["--async-save"] if made % 2 else []))
        wait_until_training(process, killed / "log" / METRICS, deadline)
        moment = rng.uniform(0.0, LONGEST)
        time.sleep(moment)
        if process.poll() is not None:
            break
        kill(process)
        made += 1
        found = latest(killed / "save")
        newest = found.name if found else "none yet"
        print(f"kill {made}: {moment:.3f} s after a step; newest checkpoint {newest}", flush=True)
    last = start(steps, killed, *save)
    assert last.wait() == 0, (directory / "output.txt").read_text()[-4000:]
    assert latest(killed / "save").name == f"iter_{steps:07d}"
    assert sorted(p.name for p in (killed / "save").glob(".*")) == [], "leftovers of killed saves"
    assert losses(killed / "log") == losses(whole / "log"), "the resumed run differs from the uninterrupted one"
    return made


def main() -> int:
    """Parses the command line and runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=900.0, help="start no further attempt after this time")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        made = campaign(args.kills, args.seconds, args.seed, Path(directory) / "campaign")
    print(f"{made} kills, every resume found a complete checkpoint and went on bit-identically")
    return 0 if made == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
