# SPDX-License-Identifier: Apache-2.0
"""Conversion between a Hugging Face ``config.json`` and :class:`~bitcpm_megatron.models.Architecture`.

Transformers 5 stores RoPE's parameters in ``rope_parameters``; Transformers 4 and most other clients store them in
``rope_theta`` and ``rope_scaling``. Both forms are read; the second one is written, because both versions read it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...cli import Number, Whole
from ...files import FileError, read_json
from ...models.architecture import MAX_LAYERS, Architecture, LongRope
from ..storage.reader import ConversionError

LLAMA, GRANITE, MINICPM, BITCPM = "llama", "granite", "minicpm", "bitcpm"
CLASSES = {
    LLAMA: "LlamaForCausalLM",
    GRANITE: "GraniteForCausalLM",
    MINICPM: "MiniCPMForCausalLM",
    BITCPM: "BitCPMForCausalLM",
}
"""Model type -> class. ``bitcpm`` is defined by ``modeling_bitcpm.py``: latent weights, quantized in the forward."""

_ABOVE_0 = Number(0, open_minimum=True)
# The same bounds as those of the training flags.
_OF_NORMS, _ROTARY_BASE = Number(1e-30, 1), Number(1, 1e12)
_ORIGINAL = "original_max_position_embeddings"
_REFUSED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
}
_DEFINED = set(
    "architectures model_type auto_map num_hidden_layers hidden_size intermediate_size num_attention_heads "
    "num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling "
    "rope_parameters tie_word_embeddings hidden_act attention_bias mlp_bias embedding_multiplier residual_multiplier "
    "logits_scaling attention_multiplier scale_emb scale_depth dim_model_base torch_dtype dtype transformers_version "
    "ternary_quantizer original_max_position_embeddings partial_rotary_factor pretraining_tp mup_denominator "
    "quantization_config".split()
)
"""Keys that define what a model computes; all other keys of a ``config.json`` (token ids, dropout, ...) are copied."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """Reads the ``config.json`` of a model directory.

    Raises:
        FileError: if it is missing or not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.exists():
        raise ConversionError(f"{path} is not there: is {directory} a Hugging Face model directory?")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: expected a JSON object")
    return config


def model_type_of(config: Mapping[str, Any]) -> str:
    """Returns the model type of a ``config.json``: ``llama``, ``granite``, ``minicpm`` or ``bitcpm``.

    Raises:
        ConversionError: if the architecture is another one.
    """
    classes = config.get("architectures") or []
    named = [kind for kind, name in CLASSES.items() if classes == [name]]
    kind = config.get("model_type") if not classes else named[0] if named else None
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ConversionError(
            f"config.json: architecture {config.get('architectures') or config.get('model_type')!r} is unknown: "
            f"{', '.join(CLASSES.values())} can be converted"
        )
    return kind


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Returns the architecture that a ``config.json`` describes.

    Raises:
        ConversionError: if the architecture is unknown, a number is missing or out of bounds, or a feature is not
            supported by this family.
    """
    kind = model_type_of(config)
    if config.get("sparse_config") is not None:
        # The model is not silently converted as a dense one for sequences up to dense_len: no file says how long the
        # sequences of a training will be, and the converted model would not record the limit.
        raise ConversionError(
            "config.json: sparse_config is InfLLM-v2's sparse attention, which is not supported; up to its dense_len "
            "tokens the model attends densely: for such sequences alone, take sparse_config out of config.json"
        )
    for name, accepted in _REFUSED.items():
        if config.get(name) not in accepted:
            raise ConversionError(
                f"config.json: {name} {config[name]!r} is not supported: this family has {accepted[0]!r}"
            )
    try:
        hidden, heads = (_value(config, k, Whole()) for k in ("hidden_size", "num_attention_heads"))
        layers = _value(config, "num_hidden_layers", Whole(maximum=MAX_LAYERS))
        tied = config.get("tie_word_embeddings", kind == MINICPM)
        if not isinstance(tied, bool):
            raise ConversionError(f"config.json: tie_word_embeddings {tied!r}: expected true or false")
        base, longrope = _rope(config)
        return Architecture(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_value(config, "intermediate_size", Whole()),
            num_attention_heads=heads,
            num_query_groups=_value(config, "num_key_value_heads", Whole(), heads),
            kv_channels=_value(config, "head_dim", Whole(), hidden // heads),
            vocab_size=_value(config, "vocab_size", Whole()),
            max_position_embeddings=_value(config, "max_position_embeddings", Whole()),
            norm_epsilon=_value(config, "rms_norm_eps", _OF_NORMS, 1e-6),
            rotary_base=base,
            # Without the key, each class has its default: MiniCPM is tied, as in Transformers' base configuration.
            tied=tied,
            longrope=longrope,
            **_multipliers(kind, config, hidden, layers),
        )
    except KeyError as error:
        raise ConversionError(f"config.json lacks {error.args[0]!r}") from None
    except FileError:
        raise
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config.json: {error}") from None


def config_for(kind: str, architecture: Architecture, template: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the content of a ``config.json`` that describes an architecture as a given model type.

    Args:
        kind: the model type.
        architecture: the architecture.
        template: an earlier ``config.json`` of the model, or {}; its keys that do not concern the computation are
            copied.
        dtype: the dtype of the weights, such as ``bfloat16``.

    Raises:
        ConversionError: if the model type cannot express the architecture.
    """
    a = architecture
    config: dict[str, Any] = {k: v for k, v in template.items() if k not in _DEFINED}
    config.update(
        architectures=[CLASSES[kind]],
        model_type=kind,
        num_hidden_layers=a.num_layers,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_query_groups,
        head_dim=a.kv_channels,
        vocab_size=a.vocab_size,
        max_position_embeddings=a.max_position_embeddings,
        rms_norm_eps=a.norm_epsilon,
        rope_theta=a.rotary_base,
        tie_word_embeddings=a.tied,
        hidden_act="silu",
        attention_bias=False,
        torch_dtype=dtype,
    )
    if a.longrope is not None:
        rope = {name: value for name, value in asdict(a.longrope).items() if value is not None}
        factors = {name: list(rope[name]) for name in ("short_factor", "long_factor")}
        config["rope_scaling"] = {"rope_type": "longrope", **rope, **factors}
        # Transformers 4 looks for the original length only outside of rope_scaling, and fails if it is missing there.
        config[_ORIGINAL] = a.longrope.original_max_position_embeddings
    if kind == LLAMA:
        if not a.is_llama:
            raise ConversionError("a plain Llama cannot hold this model's multipliers: use granite or minicpm")
        config["mlp_bias"] = False
    elif kind == MINICPM:
        if a.softmax_scale != a.kv_channels**-0.5:
            raise ConversionError("a MiniCPM cannot hold this model's attention multiplier: use granite")
        config["scale_emb"] = a.embedding_multiplier
        config["scale_depth"] = _exact(a.residual_multiplier * math.sqrt(a.num_layers), template.get("scale_depth"))
        config["dim_model_base"] = _exact(a.hidden_size / a.logits_scaling, template.get("dim_model_base"))
    else:
        config.update(
            mlp_bias=False,
            embedding_multiplier=a.embedding_multiplier,
            residual_multiplier=a.residual_multiplier,
            logits_scaling=a.logits_scaling,
            attention_multiplier=a.softmax_scale,
        )
    return config


def _value(config: Mapping[str, Any], key: str, bound: Whole | Number, default: Any = None) -> Any:
    """Returns a number of a ``config.json``, as a float if the bound is a :class:`Number`; null means the default.

    Raises:
        KeyError: if the key is absent or null and has no default.
        ConversionError: if the value is not a number, or is out of bounds.
    """
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise KeyError(key)
    mistake = bound.mistake(value)
    if mistake is not None:
        raise ConversionError(f"config.json: {key} {value!r}: {mistake}")
    return float(value) if isinstance(bound, Number) else value


def _multipliers(kind: str, config: Mapping[str, Any], hidden: int, layers: int) -> dict[str, Any]:
    if kind == LLAMA:
        return {}
    if kind == MINICPM:
        return {
            "embedding_multiplier": _value(config, "scale_emb", Number(), 1.0),
            "residual_multiplier": _value(config, "scale_depth", Number(), 1.0) / math.sqrt(layers),
            "logits_scaling": hidden / _value(config, "dim_model_base", _ABOVE_0, 1.0),
        }
    return {
        name: _value(config, name, Number(), 1.0)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    }


def _rope(config: Mapping[str, Any]) -> tuple[float, LongRope | None]:
    """Returns RoPE's base, and LongRoPE's parameters or None.

    Raises:
        ConversionError: if RoPE is scaled in another way, or only a part of the channels is rotated.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = _value({**config, **rope}, "rope_theta", _ROTARY_BASE, 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind not in ("longrope", "su"):  # "su" is LongRoPE's first name
        raise ConversionError(f"config.json: RoPE scaling {kind!r} is not supported, only longrope is")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError("config.json: partial_rotary_factor is not supported")
    original = config.get(_ORIGINAL) or rope.get(_ORIGINAL) or config["max_position_embeddings"]
    return base, LongRope(
        tuple(_value({"short_factor": factor}, "short_factor", _ABOVE_0) for factor in rope["short_factor"]),
        tuple(_value({"long_factor": factor}, "long_factor", _ABOVE_0) for factor in rope["long_factor"]),
        _value({_ORIGINAL: original}, _ORIGINAL, Whole()),
        rope.get("attention_factor"),
        rope.get("factor"),
    )


def _exact(value: float, known: Any) -> Any:
    """Returns the template's number if it equals the value up to rounding, otherwise the value, as an int if whole."""
    if isinstance(known, int | float) and math.isclose(known, value, rel_tol=1e-12):
        return known
    return int(value) if value == int(value) else value
