# SPDX-License-Identifier: Apache-2.0
"""The flags of the MiniCPM4 family, the same in our loop and in hosts."""

import argparse
from collections.abc import Iterator

from ..cli import Number, Whole
from .from_arguments import NAMES

# Real models have some tens or hundreds; beyond these bounds everything would overflow, and training would be blamed.
_FACTOR = Number(1e-6, 1e6)


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the family to a group of a parser."""
    add = group.add_argument
    add("--scale-emb", type=_FACTOR, help="multiplies the embeddings (MiniCPM; Granite's embedding_multiplier)")
    add("--scale-depth", type=_FACTOR, help="multiplies every residual branch by this / sqrt(layers) (MiniCPM)")
    add("--residual-multiplier", type=_FACTOR, help="multiplies every residual branch (Granite)")
    add("--dim-model-base", type=_FACTOR, help="divides the last hidden states by hidden size / this (MiniCPM)")
    add("--logits-scaling", type=_FACTOR, help="divides the last hidden states (Granite)")
    add("--attention-multiplier", type=_FACTOR, help="of attention scores, default 1 / sqrt(head size)")
    add("--rope-scaling-type", choices=("longrope",))
    add(
        "--rope-scaling-short-factor",
        type=_FACTOR,
        nargs="+",
        metavar="F",
        help="head size / 2 divisors of frequencies",
    )
    add("--rope-scaling-long-factor", type=_FACTOR, nargs="+", metavar="F", help="the same beyond the original length")
    add("--rope-scaling-original-max-position-embeddings", type=Whole(2, 2**24), metavar="TOKENS")
    add("--rope-scaling-attention-factor", type=_FACTOR, help="multiplies cos and sin, default by LongRoPE's formula")
    add(
        "--rope-scaling-length-factor",
        type=_FACTOR,
        help="the ratio of lengths in that formula, default --max-position-embeddings / original",
    )


def mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yields the contradictions among parsed arguments, one line each."""
    if args.scale_depth is not None and args.residual_multiplier is not None:
        yield "--scale-depth and --residual-multiplier say the same: give one"
    if args.dim_model_base is not None and args.logits_scaling is not None:
        yield "--dim-model-base and --logits-scaling say the same: give one"
    details = [name for name in NAMES if name.startswith("rope_scaling_") and name != "rope_scaling_type"]
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in details}
    if args.rope_scaling_type is None:
        idle = [flag for flag, value in given.items() if value is not None]
        if idle:
            yield f"{', '.join(idle)} without --rope-scaling-type longrope would do nothing"
        return
    if args.position_embedding_type != "rope":
        yield "--rope-scaling-type needs --position-embedding-type rope"
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    for flag, value in list(given.items())[:3]:
        if value is None:
            yield f"--rope-scaling-type longrope needs {flag}"
        elif isinstance(value, list) and len(value) != head // 2:
            yield f"{flag} has {len(value)} values, a head of {head} channels needs {head // 2}"
