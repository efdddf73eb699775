# SPDX-License-Identifier: Apache-2.0
"""Ternary models in Hugging Face Transformers, from this file alone (Transformers >= 4.56 and torch >= 2.6).

``BitCPMForCausalLM``
    A checkpoint of *latent* weights: full precision, quantized to few levels times scale in every forward pass, so that
    any Transformers trainer can go on training them. Which layers, and how, is in ``config.ternary_quantizer``. Before
    serving, ``qat_convert.py`` fuses the quantizer into the weights; what comes out loads without this file.

``MiniCPMForCausalLM``
    MiniCPM under its own name and multipliers, computed by Transformers' Granite, which is the same model.

The quantizer, per group of a latent weight W, rounded to the dtype it was trained in (group size -1: the row)::

    s  = bf16(max(m * statistic(|W|) in fp32, eps))      the mean or the maximum
    Wq = level * s                                       zeros are +0.0

with the level of the last threshold that W is beyond, see :data:`SPACES`. For ternary with the mean and m = 1 this is
clamp(round_half_even(W / s), -1, 1) * s. The gradient of W is the gradient of Wq.
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
"""Space -> its levels, and between them the thresholds, each with whether a tie takes the upper level; times scale."""
_LATENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ACTIVATION_EPS = 1e-5
_ROW_PARALLEL = ("o_proj", "down_proj")


class BitCPMConfig(GraniteConfig):
    """Granite's configuration and ``ternary_quantizer``: how the latent weights are quantized, as a dictionary.

    Its keys: ``version`` (2), ``state`` ("latent" or "fused"), ``space`` (of :data:`SPACES`), ``statistic`` ("absmean"
    or "absmax"), ``scale_multiplier``, ``eps``, ``latent_dtype``, ``row_parallel_shards``, ``activation_bits`` (16 or
    8), ``modules`` (module name -> ``{"group_size": g}``, and the four of the quantizer where they differ). Version 1
    had ternary, absmean and 1 alone.
    """

    model_type = "bitcpm"
    # A tensor-parallel plan would cut the rows of o_proj and down_proj, and with them their groups.
    base_model_tp_plan = None
    ternary_quantizer = None


class MiniCPMConfig(GraniteConfig):
    """MiniCPM's ``scale_emb``, ``scale_depth`` and ``dim_model_base``, which decide Granite's four multipliers."""

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
    """Latent weight -> quantized weight itself, and not ``W + (Wq - W)``, which in bf16 is something else."""

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
    """The quantized weight.

    Args:
        weight: latent weight ``[out, in]``.
        group: elements per scale.
        eps: lower bound of a scale.
        latent_dtype: what the weight is rounded to first. Pretraining keeps fp32 masters and quantizes their bf16
            copies; a trainer that keeps fp32 weights computes with the same quantized ones.
        space: of :data:`SPACES`.
        statistic: what a scale is made of, ``absmean`` or ``absmax``.
        scale_multiplier: of the statistic.

    Returns:
        ``[out, in]`` in the weight's dtype.
    """
    w = weight.reshape(-1, group).to(latent_dtype).float().contiguous()
    found = w.abs().amax(-1, keepdim=True) if statistic == "absmax" else _mean(w.abs())
    # By a tensor, so that the multiplier is rounded to fp32 before the product is.
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
        # In the dtype of training, where 1.5 s is not always exact.
        quantized = quantized.to(latent_dtype)
    # "+ 0.0" after the cast: -0.0 becomes +0.0, also where fp16 underflows. To a tensor of its own.
    return (quantized.to(weight.dtype) + 0.0).reshape(weight.shape)


def _mean(magnitudes: torch.Tensor) -> torch.Tensor:
    """Means ``[rows, 1]``, by a binary tree over neighbours: the order of pretraining, and with it the same scale."""
    total = magnitudes
    while total.shape[-1] > 1:
        paired = total[:, : total.shape[-1] // 2 * 2]
        pairs = paired[:, 0::2] + paired[:, 1::2]
        total = pairs if total.shape[-1] % 2 == 0 else torch.cat([pairs, total[:, -1:]], dim=-1)
    return total / torch.full_like(total, magnitudes.shape[-1])


@torch.no_grad()
def quantize_activations(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Int8 fake quantization ``[..., features]`` with ``groups`` scales per token: ``round(x / max|x| * 127)``."""
    grouped = x.float().reshape(*x.shape[:-1], groups, -1)
    s = grouped.abs().amax(-1, keepdim=True).clamp_(min=_ACTIVATION_EPS)
    return grouped.div(s).mul_(127.0).round_().mul_(s).div_(127.0).add_(0.0).reshape(x.shape).to(x.dtype)


class TernaryLinear(nn.Linear):
    """A linear layer that computes with its quantized weight. ``weight`` is the latent one, under its usual name."""

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
        """Turns a linear layer into a ternary one in place: its parameters stay the same objects, so nothing depends on
        the device or the sharding that they were created under.

        Args:
            linear: the layer.
            group: elements per scale of a row.
            eps: lower bound of the scales.
            latent_dtype: see :func:`quantize_weight`.
            activation_groups: scales per token of the layer's input; 0 leaves the input alone.
            space: see there, as the two behind it.
            statistic: see there.
            scale_multiplier: see there.
        """
        how = (group, eps, latent_dtype, space, statistic, scale_multiplier)
        linear.__class__ = cls
        linear.__dict__.update(ternary=how, activation_groups=activation_groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is ``[..., in_features]``; the result ``[..., out_features]``."""
        if self.weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"a ternary layer of {self.out_features} x {self.in_features} has a weight of "
                f"{tuple(self.weight.shape)}: groups cannot be sharded, load the model without a tensor-parallel plan"
            )
        if self.activation_groups:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))  # what the product would be computed from
            x = _FakeQuantizeActivations.apply(x, self.activation_groups)
        return nn.functional.linear(x, _FakeQuantize.apply(self.weight, *self.ternary), self.bias)

    def extra_repr(self) -> str:
        """As printed inside the model."""
        return f"{super().extra_repr()}, group={self.ternary[0]}, activation_groups={self.activation_groups}"


def _refuse_merge(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        "an adapter cannot be merged into a ternary layer: the latent weight plus the adapter would be quantized to "
        "another weight than the model was trained with. Keep the adapter beside the model (save_pretrained of the "
        "PeftModel, or unload), or train the latent weights themselves"
    )


def _refuse_merge_into(layer: nn.Module, name: str, base: nn.Module | None) -> None:
    """PEFT asks no layer whether an adapter may be merged into it, but each of its adapters (LoRA, IA3, OFT, ...) has
    the layer as ``base_layer``, and is merged by its method ``merge``."""
    if name == "base_layer" and isinstance(base, TernaryLinear) and hasattr(layer, "merge"):
        layer.__dict__["merge"] = _refuse_merge


register_module_module_registration_hook(_refuse_merge_into)


class BitCPMForCausalLM(GraniteForCausalLM):
    """A ternary model with latent weights. Generating works, but quantizes every weight for every token: to serve it,
    fuse it with ``qat_convert.py`` first."""

    config_class = BitCPMConfig

    def __init__(self, config: BitCPMConfig) -> None:
        super().__init__(config)
        make_ternary(self, config.ternary_quantizer)


class MiniCPMForCausalLM(GraniteForCausalLM):
    """MiniCPM with ordinary (or fused) weights."""

    config_class = MiniCPMConfig


def make_ternary(model: nn.Module, record: dict | None) -> None:
    """Makes the linears of a model ternary that a quantizer record lists; all others stay as they are.

    Args:
        model: any module tree with the record's module names.
        record: see :class:`BitCPMConfig`. One with ``state: fused`` lists weights that are ternary already: they are
            left alone.

    Raises:
        ValueError: no record, one that this file does not understand, or that does not fit the model.
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
    # So that save_pretrained always copies this file along.
    _class.register_for_auto_class(_auto)
