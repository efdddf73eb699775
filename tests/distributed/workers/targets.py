# SPDX-License-Identifier: Apache-2.0
"""Target stores that two ranks write and read at several layouts.

Each rank reports the steps of students by layout and kind of store, ``[loss, divergence, gradient norm]``; the error of
a student that reads a damaged store; and the differences of draws and likeliest ids over two ranks from those over one.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from support.process_groups import free_models, leave_model_parallel
from support.small_model import MODEL

from bitcpm_megatron.data.target_store import StoreError, shard_path
from bitcpm_megatron.launch.write_targets import parse_args as parse_writer
from bitcpm_megatron.objectives.extracts import draws, likeliest
from bitcpm_megatron.training.distillation.writing import write_targets
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.initialize import initialize
from bitcpm_megatron.training.loop import pretrain

WRITERS = {
    "TP2": "--tensor-model-parallel-size 2 --micro-batch-size 4",
    "PP2": "--pipeline-model-parallel-size 2 --micro-batch-size 1",
    "DP2": "--micro-batch-size 2",
}
STUDENTS = {
    "DP2": "",
    "TP2": "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2",
    "PP2": "--pipeline-model-parallel-size 2",
    "PP2+VPP2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "CP2": "--context-parallel-size 2 --micro-batch-size 2",
}
LARGER = "--hidden-size 96 --num-attention-heads 8 --init-method-std 0.2 --untie-embeddings-and-output-weights".split()


@contextlib.contextmanager
def groups(args: argparse.Namespace) -> Iterator[None]:
    initialize(args)
    yield
    leave_model_parallel()
    free_models()


def train(argv: list[str]) -> list[list[float | None]]:
    found: list[list[float | None]] = []
    args = parse_args([*MODEL, "--eval-iters", "0", "--lr", "1e-4", *argv], 2)
    with groups(args):
        pretrain(args, on_step=lambda step: found.append([step.loss, step.divergence, step.grad_norm]))
    return found


def write(directory: Path, name: str, kind: str) -> Path:
    output = directory / f"{name} {kind}"
    argv = f"--mock-data --vocab-size 300 --seq-length 32 --train-samples 23 {WRITERS[name]} {kind}".split()
    args = parse_writer([*argv, "--teacher", str(directory / "teacher"), "--output", str(output)], 2)
    with groups(args):
        write_targets(args)
    return output


def damaged(store: Path, argv: list[str]) -> str:
    """Returns the error of a student that reads a store in which a sample of one rank is damaged."""
    path = shard_path(store, 0)
    whole = path.read_bytes()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    torch.distributed.barrier()
    try:
        train(argv)
    except StoreError as error:
        leave_model_parallel()
        return str(error)
    return "nothing"


def split_and_whole() -> dict[str, float]:
    """Returns the share of draws that differ between two ranks and one, and the largest difference of the logarithms of
    the likeliest ids' probabilities (1 if the ids differ)."""
    rank = torch.distributed.get_rank()
    alone = [torch.distributed.new_group([r]) for r in range(2)][rank]
    logits = 3 * torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
    uniform = torch.from_numpy(np.random.default_rng(1).random((40, 500), np.float32))
    report = {}
    for vocab_size in (100, 60):
        mine = logits.chunk(2, -1)[rank].contiguous()
        split, whole = (
            draws(some, uniform, vocab_size, 2.0, group)
            for some, group in ((mine, torch.distributed.group.WORLD), (logits, alone))
        )
        report[f"draws of {vocab_size}"] = float((split != whole).double().mean())
        (ids, log_p), (all_ids, all_log_p) = (
            likeliest(some, 50, vocab_size, 2.0, group)
            for some, group in ((mine, torch.distributed.group.WORLD), (logits, alone))
        )
        report[f"likeliest of {vocab_size}"] = float(
            (log_p - all_log_p).abs().max() if torch.equal(ids, all_ids) else 1
        )
    return report


def main(directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    train([*LARGER, "--train-iters", "1", "--save", str(directory / "teacher")])
    train(["--train-iters", "1", "--save", str(directory / "start")])
    report: dict[str, object] = {}
    stores = {name: write(directory, name, "--distill-draws 50") for name in WRITERS}
    top = write(directory, "TP2", "--distill-top-k 40")
    for name, flags in STUDENTS.items():
        for kind, store in (("sampled", stores["TP2"]), ("top-k", top)):
            begin = [*flags.split(), "--pretrained-checkpoint", str(directory / "start"), "--train-iters", "3"]
            report[f"{name} {kind}"] = train([*begin, "--distill-targets", str(store)])
    report["damaged"] = damaged(top, ["--train-iters", "3", "--distill-targets", str(top)])
    report |= split_and_whole()
    rank = torch.distributed.get_rank()
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
