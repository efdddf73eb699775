# SPDX-License-Identifier: Apache-2.0
"""The registered op ``bitcpm::fake_quantize``: schema, backend dispatch, fake kernel, straight-through gradient."""

from collections.abc import Sequence
from typing import Any

import torch

from ..quantization import QuantizerConfig, check_weight, quantize_dequantize
from ..quantization.config import check_config
from .registry import Backend, active_backend, register_backend

register_backend(Backend(name="torch", kernel=quantize_dequantize, unavailable=lambda device_type: None))


# An op takes no objects: the quantizer travels as its fields, in their order.
_SCHEMA = (
    "(Tensor weight, str space, SymInt group_size, float eps, str statistic, float scale_multiplier, Tensor? scale) "
    "-> (Tensor, Tensor)"
)


@torch.library.custom_op("bitcpm::fake_quantize", mutates_args=(), schema=_SCHEMA)
def _fake_quantize(weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *quantizer, scale = arguments
    config = QuantizerConfig(*quantizer)
    backend = active_backend(weight.device.type).backend
    if config.space not in backend.spaces:
        raise ValueError(
            f"the backend {backend.name} quantizes to {' and '.join(backend.spaces)}, not to {config.space!r}: use "
            "quantize and dequantize"
        )
    return backend.kernel(weight, config, scale)


@_fake_quantize.register_fake
def _(weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, group_size, *_, scale = arguments
    group = check_weight(weight, group_size, scale)
    scales = weight.new_empty((weight.shape[0], weight.shape[1] // group), dtype=torch.bfloat16)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), scales


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - the autograd context has no public type
    ctx.mark_non_differentiable(output[1])


def _straight_through(ctx, grad_quantized, grad_scale):  # noqa: ANN001, ANN202
    """Straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): the gradient passes unchanged."""
    return grad_quantized, *[None] * 6


_fake_quantize.register_autograd(_straight_through, setup_context=_setup_context)


def quantize_weight(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantized weight and its scales, from the backend of the weight's device.

    Args:
        weight: latent weight ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.
        scales: given bf16 scales ``[out, groups]``, or None for the weight's own.

    Returns:
        The quantized weight ``[out, in]`` in the weight's dtype, differentiable by the straight-through estimator, and
        the bf16 scales ``[out, groups]``.

    Raises:
        ValueError: see :func:`~bitcpm_megatron.quantization.config.check_weight`; or the backend does not know the
            space.
    """
    quantizer = (config.space, config.group_size, config.eps, config.statistic, config.scale_multiplier)
    return torch.ops.bitcpm.fake_quantize(weight, *quantizer, scales)


@torch.no_grad()
def quantize_in_place(weights: Sequence[torch.Tensor], config: QuantizerConfig) -> list[torch.Tensor]:
    """Quantizes latent weights where they stand.

    Args:
        weights: ``[out, in]`` each, contiguous, of one dtype on one device; overwritten.
        config: the quantizer of all of them.

    Returns:
        The bf16 scales ``[out, groups]`` of each.

    Raises:
        ValueError: see :func:`quantize_weight`.
    """
    scales = []
    for weight in weights:
        quantized, made = quantize_weight(weight, config)
        weight.copy_(quantized)
        scales.append(made)
    return scales


def fake_quantize(weight: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """The quantized weight, differentiable by the straight-through estimator.

    Args:
        weight: latent weight ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.

    Returns:
        Same shape and dtype; equal to ``dequantize(*quantize(weight, config), config, weight.dtype)`` bit for bit.
        Its gradient with respect to ``weight`` is the identity.

    Raises:
        ValueError: see :func:`quantize_weight`.
        TypeError: the weight is no tensor, or the quantizer no configuration.
    """
    check_config(config)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a weight is a tensor [out, in], not a {type(weight).__name__}")
    return quantize_weight(weight, config)[0]
