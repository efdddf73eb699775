# SPDX-License-Identifier: Apache-2.0
"""Ternary models for Hugging Face Transformers in one self-contained file (Transformers >= 4.56 and torch >= 2.6).

``BitCPMForCausalLM``
    A model with *latent* weights: they are stored in full precision and quantized to a few levels times a scale in
    every forward pass, so that any Transformers trainer can continue the training. ``config.ternary_quantizer`` says
    which layers are quantized, and how. Before serving, ``qat_convert.py`` fuses the quantizer into the weights; the
    result loads without this file.

``MiniCPMForCausalLM``
    MiniCPM under its own name and with its own multipliers, computed by Transformers' Granite, which is the same model.

The quantizer computes, for every group of a latent weight W, rounded to the dtype that it was trained in (a group size
of -1 means the whole row), with the scale multiplier m::

    s  = bf16(max(m * statistic(|W|) in fp32, eps))      the statistic is the mean or the maximum
    Wq = level * s                                       zeros are +0.0

The level is the one above the highest threshold (times s) that W exceeds, or the lowest level if W exceeds none;
:data:`SPACES` lists levels and thresholds. For ternary weights with the mean and m = 1 this is
clamp(round_half_even(W / s), -1, 1) * s. The gradient of W is the gradient of Wq (straight-through estimator).
"""

import math
from typing import NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import GraniteConfig, GraniteForCausalLM

SPACES = {
    "ternary": ((-1.0, 0.0, 1.0), ((-0.5, True), (0.5, False))),
    "asymmetric-4": ((-2.0, -1.0, 0.0, 1.0), ((-1.5, False), (-0.5, True), (0.5, False))),
    "half-integer-4": ((-1.5, -0.5, 0.5, 1.5), ((-1.0, False), (0.0, True), (1.0, False))),
    "integer-4": ((-2.0, -1.0, 1.0, 2.0), ((-1.5, False), (0.0, True), (1.5, True))),
    "five-value": ((-2.0, -1.0, 0.0, 1.0, 2.0), ((-1.5, False), (-0.5, True), (0.5, False), (1.5, True))),
}
"""Space -> levels, and thresholds between adjacent levels with whether a tie takes the upper level; in units of s."""
_LATENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ACTIVATION_EPS = 1e-5
_ROW_PARALLEL = ("o_proj", "down_proj")


class BitCPMConfig(GraniteConfig):
    """Granite's configuration plus ``ternary_quantizer``, a dictionary that describes how latent weights are quantized.

    The keys of the dictionary are ``version`` (2), ``state`` ("latent" or "fused"), ``space`` (a key of
    :data:`SPACES`), ``statistic`` ("absmean" or "absmax"), ``scale_multiplier``, ``eps``, ``latent_dtype``,
    ``row_parallel_shards``, ``activation_bits`` (16 or 8) and ``modules``: module name -> ``{"group_size": g}``, plus
    ``space``, ``statistic``, ``scale_multiplier`` and ``eps`` if the module's own differ. Version 1 has only ternary
    weights, absmean and a multiplier of 1.
    """

    model_type = "bitcpm"
    # A tensor-parallel plan would cut the rows of o_proj and down_proj, and with them their groups, so there is none.
    base_model_tp_plan = None
    ternary_quantizer = None


class MiniCPMConfig(GraniteConfig):
    """MiniCPM's configuration: ``scale_emb``, ``scale_depth`` and ``dim_model_base`` set Granite's four multipliers."""

    model_type = "minicpm"

    def __init__(self, scale_emb=1, scale_depth=1, dim_model_base=1, tie_word_embeddings=True, **kwargs):  # noqa: ANN001, ANN003
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        head_dim = kwargs.get("head_dim") or self.hidden_size // self.num_attention_heads
        self.scale_emb, self.scale_depth, self.dim_model_base = scale_emb, scale_depth, dim_model_base
        self.embedding_multiplier = float(scale_emb)
        self.residual_multiplier = scale_depth / math.sqrt(self.num_hidden_layers)
        self.logits_scaling = self.hidden_size / dim_model_base
        self.attention_multiplier = head_dim**-0.5


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator that returns the quantized weight Wq itself: in bf16, ``W + (Wq - W)`` differs."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, *how) -> torch.Tensor:  # noqa: ANN001, ANN002
        return quantize_weight(weight, *how)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN001
        return (grad, *[None] * (len(ctx.needs_input_grad) - 1))


class _FakeQuantizeActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, groups: int) -> torch.Tensor:  # noqa: ANN001
        return quantize_activations(x, groups)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN001
        return grad, None


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor,
    group: int,
    eps: float,
    latent_dtype: torch.dtype,
    space: str = "ternary",
    statistic: str = "absmean",
    scale_multiplier: float = 1.0,
) -> torch.Tensor:
    """Returns the quantized weight of a latent weight.

    Args:
        weight: the latent weight ``[out, in]`` (output features, input features).
        group: the number of elements per scale.
        eps: the lower bound of a scale.
        latent_dtype: the dtype that the weight is first rounded to. Pretraining keeps fp32 masters and quantizes their
            bf16 copies; with it, a trainer that keeps fp32 weights computes with the same quantized weights.
        space: the quantization space, a key of :data:`SPACES`.
        statistic: the statistic that a scale is computed from, ``absmean`` or ``absmax``.
        scale_multiplier: the factor of the statistic.

    Returns:
        The quantized weight ``[out, in]`` in the dtype of ``weight``.
    """
    w = weight.reshape(-1, group).to(latent_dtype).float().contiguous()
    found = w.abs().amax(-1, keepdim=True) if statistic == "absmax" else _mean(w.abs())
    # The multiplier is a tensor, so that it is rounded to fp32 before the product is computed.
    s = (found * torch.full_like(found, scale_multiplier)).clamp_(min=eps).to(torch.bfloat16).float()
    levels, thresholds = SPACES[space]
    if space == "ternary":
        quantized = torch.div(w, s).round_().clamp_(-1.0, 1.0).mul_(s)
    else:
        s = torch.where(s.isfinite(), s, torch.nan)
        quantized = (s * levels[0]).expand_as(w)
        for level, (threshold, upper) in zip(levels[1:], thresholds):  # noqa: B905 - of the same length
            beyond = w >= s * threshold if upper else w > s * threshold
            quantized = torch.where(beyond, s * level, quantized)
        # Rounded to the dtype of training, which does not always represent 1.5 s exactly.
        quantized = quantized.to(latent_dtype)
    # "+ 0.0" follows the cast to turn -0.0 into +0.0, also those of an fp16 underflow. The result is a new tensor.
    return (quantized.to(weight.dtype) + 0.0).reshape(weight.shape)


def _mean(magnitudes: torch.Tensor) -> torch.Tensor:
    """Returns the mean ``[rows, 1]`` of each row of ``magnitudes`` ``[rows, group]``.

    It sums in a binary tree over neighbors, which is the order of pretraining, so that the scales are the same.
    """
    total = magnitudes
    while total.shape[-1] > 1:
        paired = total[:, : total.shape[-1] // 2 * 2]
        pairs = paired[:, 0::2] + paired[:, 1::2]
        total = pairs if total.shape[-1] % 2 == 0 else torch.cat([pairs, total[:, -1:]], dim=-1)
    return total / torch.full_like(total, magnitudes.shape[-1])


@torch.no_grad()
def quantize_activations(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns activations ``[..., features]`` fake-quantized to int8, with ``groups`` scales s = max|x| per token.

    The codes are ``round(x / s * 127)``, and the result is their values ``code * s / 127`` in the dtype of ``x``.
    """
    grouped = x.float().reshape(*x.shape[:-1], groups, -1)
    s = grouped.abs().amax(-1, keepdim=True).clamp_(min=_ACTIVATION_EPS)
    return grouped.div(s).mul_(127.0).round_().mul_(s).div_(127.0).add_(0.0).reshape(x.shape).to(x.dtype)


class TernaryLinear(nn.Linear):
    """Linear layer that computes with its quantized weight; ``weight`` is the latent weight, under its usual name."""

    ternary: tuple[int, float, torch.dtype, str, str, float]
    activation_groups: int

    @classmethod
    def convert(
        cls,
        linear: nn.Linear,
        group: int,
        eps: float,
        latent_dtype: torch.dtype,
        activation_groups: int,
        space: str = "ternary",
        statistic: str = "absmean",
        scale_multiplier: float = 1.0,
    ) -> None:
        """Turns a linear layer into a ternary one in place.

        Its parameters stay the same objects, so that the device and the sharding they were created with do not matter.

        Args:
            linear: the layer.
            group: the number of elements per scale along a row.
            eps: the lower bound of the scales.
            latent_dtype: the dtype that the weight is rounded to before it is quantized, see :func:`quantize_weight`.
            activation_groups: the number of scales per token of the layer's input; 0 does not quantize the input.
            space: the quantization space of the weight, a key of :data:`SPACES`.
            statistic: the statistic that a scale is computed from, ``absmean`` or ``absmax``.
            scale_multiplier: the factor of the statistic.
        """
        how = (group, eps, latent_dtype, space, statistic, scale_multiplier)
        linear.__class__ = cls
        linear.__dict__.update(ternary=how, activation_groups=activation_groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer's output ``[..., out_features]`` from its input ``x`` ``[..., in_features]``.

        Raises:
            ValueError: if the weight has been sharded.
        """
        if self.weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"a ternary layer of {self.out_features} x {self.in_features} has a weight of "
                f"{tuple(self.weight.shape)}: groups cannot be sharded, load the model without a tensor-parallel plan"
            )
        if self.activation_groups:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))  # the input of the product under autocast
            x = _FakeQuantizeActivations.apply(x, self.activation_groups)
        return nn.functional.linear(x, _FakeQuantize.apply(self.weight, *self.ternary), self.bias)

    def extra_repr(self) -> str:
        """Returns the description that is printed within the model."""
        return f"{super().extra_repr()}, group={self.ternary[0]}, activation_groups={self.activation_groups}"


def _refuse_merge(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        "an adapter cannot be merged into a ternary layer: the latent weight plus the adapter would be quantized to "
        "another weight than the model was trained with. Keep the adapter beside the model (save_pretrained of the "
        "PeftModel, or unload), or train the latent weights themselves"
    )


def _refuse_merge_into(layer: nn.Module, name: str, base: nn.Module | None) -> None:
    """Replaces the method ``merge`` of an adapter around a ternary layer by one that raises.

    PEFT does not ask a layer whether an adapter may be merged into it, but each of its adapters (LoRA, IA3, OFT, ...)
    registers the layer as ``base_layer`` and is merged by its method ``merge``.
    """
    if name == "base_layer" and isinstance(base, TernaryLinear) and hasattr(layer, "merge"):
        layer.__dict__["merge"] = _refuse_merge


register_module_module_registration_hook(_refuse_merge_into)


class BitCPMForCausalLM(GraniteForCausalLM):
    """Ternary model with latent weights.

    It can generate text, but quantizes every weight for every token: fuse it with ``qat_convert.py`` before serving.
    """

    config_class = BitCPMConfig

    def __init__(self, config: BitCPMConfig) -> None:
        super().__init__(config)
        make_ternary(self, config.ternary_quantizer)


class MiniCPMForCausalLM(GraniteForCausalLM):
    """MiniCPM with ordinary or fused weights."""

    config_class = MiniCPMConfig


def make_ternary(model: nn.Module, record: dict | None) -> None:
    """Makes those linears of a model ternary that a quantizer record lists; all others stay unchanged.

    Args:
        model: a module tree that has the record's module names.
        record: the quantizer record, with the keys described in :class:`BitCPMConfig`. If its state is "fused", its
            weights are already ternary and nothing is changed.

    Raises:
        ValueError: if there is no record, or this file does not understand it, or it does not fit the model.
    """
    if not isinstance(record, dict):
        raise ValueError("config.json has no `ternary_quantizer`: without it latent weights mean nothing")
    if record.get("version") == 1:
        record = {"statistic": "absmean", "scale_multiplier": 1.0, **record}
    missing = [k for k in ("scale_multiplier", "eps", "row_parallel_shards", "modules") if k not in record]
    if missing:
        raise ValueError(f"ternary_quantizer lacks {missing}")
    known = {
        "version": (1, 2),
        "state": ("latent", "fused"),
        "space": tuple(SPACES),
        "statistic": ("absmean", "absmax"),
        "activation_bits": (8, 16),
        "latent_dtype": tuple(_LATENT_DTYPES),
    }
    for key, values in known.items():
        if record.get(key) not in values:
            raise ValueError(f"ternary_quantizer: {key} is {record.get(key)!r}; this file knows {values}")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    unknown = sorted(set(record["modules"]) - set(linears))
    if unknown or not record["modules"]:
        raise ValueError(
            f"ternary_quantizer lists what is no linear layer of this model: {unknown or 'nothing at all'}"
        )
    if record["state"] == "fused":
        return
    shards = record["row_parallel_shards"]
    for name, how in record["modules"].items():
        linear = linears[name]
        group = linear.in_features if how["group_size"] == -1 else how["group_size"]
        groups = shards if name.rpartition(".")[2] in _ROW_PARALLEL else 1
        own = {key: how.get(key, record[key]) for key in ("space", "statistic", "scale_multiplier")}
        known_scale = own["statistic"] in known["statistic"] and float(own["scale_multiplier"]) > 0
        if own["space"] not in SPACES or not known_scale or group < 1 or linear.in_features % group:
            raise ValueError(f"ternary_quantizer: {name} of {linear.in_features} inputs cannot be quantized by {how}")
        if linear.in_features % groups:
            raise ValueError(f"ternary_quantizer: {shards} row-parallel shards do not divide the inputs of {name}")
        activation_groups = groups if record["activation_bits"] == 8 else 0
        eps = float(how.get("eps", record["eps"]))
        TernaryLinear.convert(linear, group, eps, _LATENT_DTYPES[record["latent_dtype"]], activation_groups, **own)


for _class, _auto in (
    (BitCPMConfig, "AutoConfig"),
    (BitCPMForCausalLM, "AutoModelForCausalLM"),
    (MiniCPMConfig, "AutoConfig"),
    (MiniCPMForCausalLM, "AutoModelForCausalLM"),
):
    # With the registration, save_pretrained always copies this file along with the model.
    _class.register_for_auto_class(_auto)
