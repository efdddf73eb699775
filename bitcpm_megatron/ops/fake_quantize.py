# SPDX-License-Identifier: Apache-2.0
"""The registered op ``bitcpm::fake_quantize``: schema, backend dispatch, fake kernel, straight-through gradient."""

import torch

from ..quantization import QuantizerConfig, check_weight, quantize_dequantize
from ..quantization.config import check_config
from .registry import Backend, active_backend, register_backend

register_backend(Backend(name="torch", kernel=quantize_dequantize, unavailable=lambda device_type: None))


@torch.library.custom_op("bitcpm::fake_quantize", mutates_args=())
def _fake_quantize(
    weight: torch.Tensor, group_size: int, eps: float, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return active_backend(weight.device.type).backend.kernel(weight, group_size, eps, scale)


@_fake_quantize.register_fake
def _(
    weight: torch.Tensor, group_size: int, eps: float, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    group = check_weight(weight, group_size, scale)
    scales = weight.new_empty((weight.shape[0], weight.shape[1] // group), dtype=torch.bfloat16)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), scales


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - the autograd context has no public type
    ctx.mark_non_differentiable(output[1])


def _straight_through(ctx, grad_quantized, grad_scale):  # noqa: ANN001, ANN202
    """Straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): the gradient passes unchanged."""
    return grad_quantized, None, None, None


_fake_quantize.register_autograd(_straight_through, setup_context=_setup_context)


def fake_quantize(weight: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """The quantized weight, differentiable by the straight-through estimator.

    Args:
        weight: latent weight ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.

    Returns:
        Same shape and dtype; equal to ``dequantize(*quantize(weight, config), config, weight.dtype)`` bit for bit.
        Its gradient with respect to ``weight`` is the identity.

    Raises:
        ValueError: see :func:`~bitcpm_megatron.quantization.config.check_weight`; or a space that is not ternary.
        TypeError: the weight is no tensor, or the quantizer no configuration.
    """
    check_config(config)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a weight is a tensor [out, in], not a {type(weight).__name__}")
    if config.space != "ternary":
        raise ValueError(f"the op quantizes to ternary, not to {config.space!r}: use quantize and dequantize")
    return torch.ops.bitcpm.fake_quantize(weight, config.group_size, config.eps, None)[0]
