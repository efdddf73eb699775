# SPDX-License-Identifier: Apache-2.0
"""Proves that a change leaves every loss unchanged: trains with a base commit and with this checkout, and compares.

    python scripts/compare_losses.py BASE_COMMIT [--iterations 20] [--tolerance 0] [--no-demo]

Both train the demo's two models for 200 steps and a small model in every layout for --iterations steps; each prepares
its own data. All losses, validation losses, gradient norms, learning rates and records of the quantizer's telemetry
must be equal in every bit. If a change is meant to move them, use --tolerance: then only the first step is compared,
within that relative difference. The table and the records stay in runs/compare_losses. Exit status: 0 equal, 1 a run
failed, 3 something differs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from tqdm import tqdm

from bitcpm_megatron.cli import FailedError, MismatchError, Number, Parser, Whole
from bitcpm_megatron.cli import run as handled

MODEL = """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
    --global-batch-size 4 --mock-data --vocab-size 300 --make-vocab-size-divisible-by 192 --lr 1e-2 --lr-warmup-iters 2
    --use-distributed-optimizer --log-interval 1 --bf16 --ternary --ternary-row-parallel-shards 2
    --ternary-telemetry-interval 5 --eval-interval 10 --eval-iters 2
""".split()
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "TP1": (1, ""),
    "TP2": (2, TP2),
    "TP2+SP": (2, f"{TP2} --sequence-parallel"),
    "PP2": (2, PP2),
    "PP2+VPP2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "DP2": (2, ""),
    "DP2+overlaps": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "TP2xPP2": (4, f"{TP2} {PP2} --sequence-parallel"),
    "TP2xDP2": (4, f"{TP2} --sequence-parallel --overlap-grad-reduce --overlap-param-gather"),
    "int8": (2, f"{TP2} --sequence-parallel --ternary-activation-bits 8"),
    "EP2": (2, "--num-experts 4 --moe-ffn-hidden-size 64 --expert-model-parallel-size 2"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}
_CLOCK = ("tokens_per_second", "elapsed_ms")


def main(argv: list[str] | None = None) -> int:
    """Compares the two trees; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--iterations", type=Whole(3, 10**5), default=20, help="of every layout (default: 20)")
    parser.add_argument("--tolerance", type=Number(0, 1), default=0.0, help="of the first step alone (default: 0)")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo's two runs out")
    args = parser.parse_args(argv)
    return handled(lambda: compare(args.base, args.iterations, args.tolerance, not args.no_demo))


def compare(base: str, iterations: int, tolerance: float, demo: bool) -> None:
    """Trains everything with the base commit and with this checkout, and compares the logs.

    Raises:
        FailedError: if there is no such commit, or a run fails.
        MismatchError: if a run differs; the message names every such run and its first difference.
    """
    out = CHECKOUT / "runs" / "compare_losses"
    tree = out / "base"
    _git("worktree", "prune")
    out.mkdir(parents=True, exist_ok=True)
    if tree.exists():
        _git("worktree", "remove", "--force", str(tree))
    _git("worktree", "add", "--detach", str(tree), base)
    try:
        different = _compare_all({"base": tree, "here": CHECKOUT}, out, iterations, tolerance, demo)
    finally:
        _git("worktree", "remove", "--force", str(tree))
    if different:
        raise MismatchError("\n  ".join(["these runs are not what they were:", *different]))
    print(f"compare_losses: {len(LAYOUTS) + demo} of {len(LAYOUTS) + demo} as at {base}")


def _compare_all(trees: Mapping[str, Path], out: Path, iterations: int, tolerance: float, demo: bool) -> list[str]:
    different = []
    runs = [*(["demo"] if demo else []), *LAYOUTS]
    for name in tqdm(runs, desc="runs", disable=None):
        found = {}
        for side, tree in trees.items():
            place = out / name.replace("+", "_") / side
            if name == "demo":
                found[side] = _demo(tree, place)
            else:
                found[side] = {name: _layout(name, tree, place, iterations)}
        for run, expected in found["base"].items():
            problem = difference(expected, found["here"][run], tolerance)
            good = f"first step within {tolerance:g}" if tolerance else f"{len(expected)} records equal"
            print(f"{run:<14} {problem or good}", flush=True)
            if problem:
                different.append(f"{run}: {problem}")
    return different


def difference(expected: list[dict[str, Any]], found: list[dict[str, Any]], tolerance: float) -> str | None:
    """Returns a description of the first difference between two logs, or None if they agree."""
    if tolerance:
        expected, found = ([r for r in records if r["iteration"] == 1][:1] for records in (expected, found))
    if len(expected) != len(found):
        return f"{len(found)} records instead of {len(expected)}"
    for before, now in zip(expected, found, strict=True):
        for key in sorted(before.keys() | now.keys()):
            a, b = before.get(key), now.get(key)
            near = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= tolerance * abs(a)
            # The values are compared as text, so that NaN equals NaN.
            if json.dumps(a) != json.dumps(b) and not near:
                return f"{before['kind']} of iteration {before['iteration']}: {key} is {b!r}, was {a!r}"
    return None


def _layout(name: str, tree: Path, place: Path, iterations: int) -> list[dict[str, Any]]:
    ranks, flags = LAYOUTS[name]
    line = ["--standalone", "--nproc_per_node", str(ranks), "launch/pretrain.py", *MODEL, *flags.split()]
    line += ["--train-iters", str(iterations), "--log-dir", str(place)]
    _run([sys.executable, "launch/agent.py", *line], tree, place)
    return _records(place)


def _demo(tree: Path, place: Path) -> dict[str, list[dict[str, Any]]]:
    _run([sys.executable, "launch/demo.py", "--output", str(place)], tree, place)
    newest = max(place.glob("*-*"))
    return {f"demo {name}": _records(newest / name) for name in ("bf16", "ternary")}


def _records(place: Path) -> list[dict[str, Any]]:
    lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in _CLOCK} for line in lines]


def _run(command: list[str], tree: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.jsonl").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    with (place / "output.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise FailedError(f"{' '.join(command)} in {tree} ended with {done.returncode}: see {place / 'output.txt'}")


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"git {' '.join(arguments)}: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
