# SPDX-License-Identifier: Apache-2.0
"""Conversion between Megatron-LM's arguments and the model that they describe, in both directions.

It works on Megatron-LM's arguments by name, from any source: a parsed command line, or a checkpoint's record.
"""

import math
from collections.abc import Mapping
from typing import Any

from .architecture import Architecture, ArchitectureError, LongRope, Multipliers

NAMES = (
    "scale_emb scale_depth residual_multiplier dim_model_base logits_scaling attention_multiplier rope_scaling_type "
    "rope_scaling_short_factor rope_scaling_long_factor rope_scaling_original_max_position_embeddings "
    "rope_scaling_attention_factor rope_scaling_length_factor"
).split()
"""The arguments of the MiniCPM4 family, by the names that a checkpoint records."""

_NUMBERS = "num_layers hidden_size ffn_hidden_size num_attention_heads max_position_embeddings".split()
_OFF = (
    "add_qkv_bias qk_layernorm multi_latent_attention rotary_interleaved use_rope_scaling apply_layernorm_1p "
    "squared_relu quick_geglu attention_output_gate apply_residual_connection_post_layernorm"
).split()
# The values that arguments of a model of this family have; None is the value in versions without the argument.
_NEEDED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "num_experts": (None,),
    "rotary_percent": (1.0, None),
    "rotary_seq_len_interpolation_factor": (None,),
    "mtp_num_layers": (None, 0),
    "window_size": (None,),
    "softmax_type": ("vanilla", None),
    "no_rope_freq": (None,),
    **dict.fromkeys(_OFF, (False, None)),
}


def multipliers_of(args: Mapping[str, Any]) -> Multipliers:
    """Returns the multipliers that arguments describe; absent ones are those of a Llama."""

    def given(name: str, default: Any = 1.0) -> Any:
        return default if args.get(name) is None else args[name]

    residual, scaling = given("residual_multiplier"), given("logits_scaling")
    if args.get("scale_depth") is not None:
        residual = args["scale_depth"] / math.sqrt(args["num_layers"])
    if args.get("dim_model_base") is not None:
        scaling = args["hidden_size"] / args["dim_model_base"]
    return Multipliers(given("scale_emb"), residual, scaling, given("attention_multiplier", None))


def longrope_of(args: Mapping[str, Any]) -> LongRope | None:
    """Returns LongRoPE's numbers, or None if the arguments name no LongRoPE."""
    if args.get("rope_scaling_type") is None:
        return None
    return LongRope(
        tuple(args["rope_scaling_short_factor"]),
        tuple(args["rope_scaling_long_factor"]),
        args["rope_scaling_original_max_position_embeddings"],
        args.get("rope_scaling_attention_factor"),
        args.get("rope_scaling_length_factor"),
    )


def architecture_of(args: Mapping[str, Any], vocab_size: int) -> Architecture:
    """Returns the model that a run's arguments describe.

    Args:
        args: the arguments by name, with dependent defaults filled in.
        vocab_size: the number of tokens, without padding.

    Raises:
        ArchitectureError: if the model is not of this family (no RoPE, LayerNorm, biases, experts ...) or an argument
            is missing; the message names the arguments.
    """
    foreign = [f"{name}={args.get(name)!r}" for name, accepted in _NEEDED.items() if args.get(name) not in accepted]
    if foreign:
        raise ArchitectureError(
            f"the model is no Llama, MiniCPM or Granite: its arguments say {', '.join(foreign)} "
            "(needed: RoPE over whole heads, RMSNorm, SwiGLU, no biases, no experts)"
        )
    missing = [name for name in _NUMBERS if not isinstance(args.get(name), int)]
    if args.get("norm_epsilon") is None and args.get("layernorm_epsilon") is None:
        missing.append("norm_epsilon")
    if missing:
        raise ArchitectureError(f"the run's arguments do not say {', '.join(missing)}")
    heads = args["num_attention_heads"]
    grouped = args.get("group_query_attention") and args.get("num_query_groups")
    return Architecture(
        **{name: args[name] for name in _NUMBERS},
        num_query_groups=args["num_query_groups"] if grouped else heads,
        kv_channels=args.get("kv_channels") or args["hidden_size"] // heads,
        vocab_size=vocab_size,
        # Megatron-LM's --norm-epsilon; from 0.16 on it has the configuration's name, layernorm_epsilon.
        norm_epsilon=args["layernorm_epsilon"] if args.get("norm_epsilon") is None else args["norm_epsilon"],
        rotary_base=float(args.get("rotary_base") or 10000),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        longrope=longrope_of(args),
        **vars(multipliers_of(args)),
    )


def arguments_of(architecture: Architecture) -> dict[str, Any]:
    """Returns the arguments, by name, that describe an architecture; the inverse of :func:`architecture_of`.

    Raises:
        ArchitectureError: if Megatron-LM's flags cannot express the architecture.
    """
    a = architecture
    if a.rotary_base != int(a.rotary_base):
        raise ArchitectureError(f"--rotary-base takes whole numbers, the model has {a.rotary_base}")
    found: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "group_query_attention": a.num_query_groups != a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "max_position_embeddings": a.max_position_embeddings,
        "norm_epsilon": a.norm_epsilon,
        "rotary_base": int(a.rotary_base),
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": not a.tied,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "num_experts": None,
        **dict.fromkeys(NAMES),
    }
    multipliers = {"scale_emb": a.embedding_multiplier, "residual_multiplier": a.residual_multiplier}
    multipliers["logits_scaling"] = a.logits_scaling
    found.update({name: value for name, value in multipliers.items() if value != 1.0})
    if a.attention_multiplier not in (None, a.kv_channels**-0.5):
        found["attention_multiplier"] = a.attention_multiplier
    if a.longrope is not None:
        found.update(
            rope_scaling_type="longrope",
            rope_scaling_short_factor=list(a.longrope.short_factor),
            rope_scaling_long_factor=list(a.longrope.long_factor),
            rope_scaling_original_max_position_embeddings=a.longrope.original_max_position_embeddings,
            rope_scaling_attention_factor=a.longrope.attention_factor,
            rope_scaling_length_factor=a.longrope.factor,
        )
    return found


def flags_of(architecture: Architecture) -> dict[str, Any]:
    """Returns the flags of a preset file (``launch/models``) that describe an architecture.

    Raises:
        ArchitectureError: if :func:`arguments_of` raises it.
    """
    found: dict[str, Any] = {}
    for name, value in arguments_of(architecture).items():
        if name == "add_bias_linear":
            found["disable-bias-linear"] = True
        elif name != "rotary_percent" and value is not None and value is not False:
            found[name.replace("_", "-")] = value
    return {**found, "attention-dropout": 0.0, "hidden-dropout": 0.0}
