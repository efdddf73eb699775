# SPDX-License-Identifier: Apache-2.0
"""The model with which whole training runs are tested, and readers of their results."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from bitcpm_megatron.training.metrics import read_metrics

# With a divisor of 192 the vocabulary is padded to the same 384 rows at TP1 and TP2.
MODEL = """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
    --global-batch-size 4 --mock-data --vocab-size 300 --lr 1e-2 --use-distributed-optimizer --log-interval 1
    --make-vocab-size-divisible-by 192
""".split()


def succeeded(report: dict[str, dict], *names: str) -> None:
    """Asserts that the named runs of a report ended with exit status 0."""
    for name in names:
        assert report[name]["status"] == 0, f"{name}: {report[name]['stderr'][-4000:]}"


def losses(directory: Path) -> list[tuple]:
    """Returns everything in a run's log that must not depend on how the run was executed."""
    return [
        (r["kind"], r["iteration"], r["lm_loss"], r.get("grad_norm"), r["consumed_samples"], r.get("distill_loss"))
        for r in read_metrics(directory)
        if r["kind"] in ("train", "valid")
    ]


def quantized_weights(directory: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:
    """Returns the quantized weights of a run's first step by module path; ranks with the same module must agree."""
    merged: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        for path, weight in torch.load(directory / f"{name}.rank{rank}.pt", weights_only=True).items():
            assert torch.equal(merged.setdefault(path, weight), weight), path
    return merged


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a checkpoint, unsharded, without megatron."""
    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def first_moments(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Reads Adam's first moments from a checkpoint, by the name of the weight."""
    prefix = "optimizer.state.exp_avg."
    return {key.removeprefix(prefix): t for key, t in tensors(checkpoint).items() if key.startswith(prefix)}
