# SPDX-License-Identifier: Apache-2.0
"""Settings in which quantized weights may be resident in the parameters, and a pairwise cover of them."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from .pairwise import cover

MODEL = """
    --num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data --vocab-size 300 --lr 1e-2
    --make-vocab-size-divisible-by 192 --bf16 --log-interval 1 --eval-iters 0 --ternary
""".split()
LAYOUTS = {
    "DP1": (1, []),
    "DP2": (2, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "TP2xDP2": (4, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP2+VPP2": (2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "EP2": (2, ["--expert-model-parallel-size", "2", "--num-experts", "4", "--moe-ffn-hidden-size", "128"]),
}


@dataclass(frozen=True)
class Setting:
    """A way to train: layout, both overlaps, group size, fused weight gradients, distributed optimizer."""

    layout: str
    overlaps: bool
    group: int
    fusion: bool
    distributed: bool

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return LAYOUTS[self.layout][0]

    def __str__(self) -> str:
        words = [self.layout, f"g={self.group}"]
        words += [name for name in ("overlaps", "fusion", "distributed") if getattr(self, name)]
        return " ".join(words)


def _possible() -> list[Setting]:
    every = itertools.product(LAYOUTS, (False, True), (-1, 64, 128), (False, True), (True, False))
    settings = [Setting(*values) for values in every]
    # Parameters are gathered, so that this can overlap, only if the optimizer is distributed.
    return [s for s in settings if s.distributed or not s.overlaps]


SETTINGS = cover(_possible())


def arguments(setting: Setting, cache: str, steps: int, more: list[str]) -> list[str]:
    """Returns the arguments of ``launch/pretrain.py`` for a setting."""
    argv = [*MODEL, *LAYOUTS[setting.layout][1], "--ternary-group-size", str(setting.group), "--ternary-cache", cache]
    argv += ["--use-distributed-optimizer"] if setting.distributed else []
    argv += ["--overlap-grad-reduce", "--overlap-param-gather"] if setting.overlaps else []
    argv += [] if setting.fusion else ["--no-gradient-accumulation-fusion"]
    return [*argv, "--train-iters", str(steps), *more]


def compared(directory: Path, names: tuple[str, ...], ranks: int) -> int:
    """Asserts that runs took the same steps on every rank; returns how many groups are cut by the edges of shards."""
    cuts = 0
    for rank in range(ranks):
        found = {name: json.loads((directory / f"{name}.digests.rank{rank}.json").read_text()) for name in names}
        first, *others = found.values()
        assert any("masters" in step for step in first["steps"])
        for name, other in zip(names[1:], others, strict=True):
            for number, (a, b) in enumerate(zip(first["steps"], other["steps"], strict=True), start=1):
                assert a == b, f"{names[0]} and {name} differ in step {number} on rank {rank}: {a}, {b}"
        cuts += first["cut_groups"]
    return cuts
