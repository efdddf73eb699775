# SPDX-License-Identifier: Apache-2.0
"""The flags of the MiniCPM4 family, the same in our loop and in hosts."""

import argparse

from ..cli import Number, Whole
from .from_arguments import NAMES

# Models have some tens or hundreds; beyond these bounds everything would overflow, and training be blamed.
_FACTOR = Number(1e-6, 1e6)


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags to a group of a parser."""
    group.add_argument(
        "--scale-emb", type=_FACTOR, help="multiplies the embeddings (MiniCPM; Granite's embedding_multiplier)"
    )
    group.add_argument(
        "--scale-depth", type=_FACTOR, help="multiplies every residual branch by this / sqrt(layers) (MiniCPM)"
    )
    group.add_argument("--residual-multiplier", type=_FACTOR, help="multiplies every residual branch (Granite)")
    group.add_argument(
        "--dim-model-base", type=_FACTOR, help="divides the last hidden states by hidden size / this (MiniCPM)"
    )
    group.add_argument("--logits-scaling", type=_FACTOR, help="divides the last hidden states (Granite)")
    group.add_argument("--attention-multiplier", type=_FACTOR, help="of attention scores, default 1 / sqrt(head size)")
    group.add_argument("--rope-scaling-type", choices=("longrope",))
    group.add_argument(
        "--rope-scaling-short-factor",
        type=_FACTOR,
        nargs="+",
        metavar="F",
        help="head size / 2 divisors of frequencies",
    )
    group.add_argument(
        "--rope-scaling-long-factor", type=_FACTOR, nargs="+", metavar="F", help="the same beyond the original length"
    )
    group.add_argument("--rope-scaling-original-max-position-embeddings", type=Whole(2, 2**24), metavar="TOKENS")
    group.add_argument(
        "--rope-scaling-attention-factor", type=_FACTOR, help="multiplies cos and sin, default by LongRoPE's formula"
    )
    group.add_argument(
        "--rope-scaling-length-factor",
        type=_FACTOR,
        help="the ratio of lengths in that formula, default --max-position-embeddings / original",
    )


def mistakes(args: argparse.Namespace) -> list[str]:
    """What cannot go together in parsed arguments, one line each."""
    found = []
    if args.scale_depth is not None and args.residual_multiplier is not None:
        found.append("--scale-depth and --residual-multiplier say the same: give one")
    if args.dim_model_base is not None and args.logits_scaling is not None:
        found.append("--dim-model-base and --logits-scaling say the same: give one")
    details = [name for name in NAMES if name.startswith("rope_scaling_") and name != "rope_scaling_type"]
    if args.rope_scaling_type is None:
        given = [f"--{name.replace('_', '-')}" for name in details if getattr(args, name) is not None]
        return found + ([f"{', '.join(given)} without --rope-scaling-type longrope would do nothing"] if given else [])
    if args.position_embedding_type != "rope":
        found.append("--rope-scaling-type needs --position-embedding-type rope")
    for name in details[:3]:
        if getattr(args, name) is None:
            found.append(f"--rope-scaling-type longrope needs --{name.replace('_', '-')}")
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    for name in details[:2]:
        if getattr(args, name) is not None and len(getattr(args, name)) != head // 2:
            found.append(
                f"--{name.replace('_', '-')} has {len(getattr(args, name))} values, a head of {head} channels needs "
                f"{head // 2}"
            )
    return found
