# SPDX-License-Identifier: Apache-2.0
"""The registered op ``bitcpm::fake_quantize_activations``, with a straight-through gradient."""

import torch

from ..quantization.activations import EPS, check_activations
from .int8 import int8_kernels


@torch.library.custom_op("bitcpm::fake_quantize_activations", mutates_args=())
def _fake_quantize_activations(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    check_activations(x, groups)
    return int8_kernels(x.device.type).values(x, groups, eps)


@_fake_quantize_activations.register_fake
def _(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _straight_through(ctx, grad):  # noqa: ANN001 - the autograd context has no public type
    return grad, None, None


_fake_quantize_activations.register_autograd(_straight_through)


def fake_quantize_activations(x: torch.Tensor, groups: int = 1, eps: float = EPS) -> torch.Tensor:
    """Applies int8 fake quantization per token, differentiable by the straight-through estimator.

    Args:
        x: the activations, ``[..., features]`` in fp32, bf16 or fp16.
        groups: the number of parts of the features that have a scale each; see
            :func:`bitcpm_megatron.quantization.quantize_activations`, which computes the same values.
        eps: the lower bound of a scale.

    Returns:
        The values that the int8 codes represent, in the shape and dtype of ``x``; the gradient passes unchanged.

    Raises:
        ValueError: if the groups do not divide the features, or the dtype is not a floating-point one.
    """
    return torch.ops.bitcpm.fake_quantize_activations(x, groups, eps)
