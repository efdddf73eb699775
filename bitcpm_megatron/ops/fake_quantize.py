# SPDX-License-Identifier: Apache-2.0
"""The registered quantization ops: schemas, backend dispatch, fake kernels, and the straight-through gradient.

``bitcpm::fake_quantize`` quantizes one weight and is differentiable; ``bitcpm::fake_quantize_all`` quantizes many
weights in few launches.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..quantization import SPACES, QuantizerConfig, check_weight, quantize_dequantize
from ..quantization.config import check_config
from .registry import Backend, active_backend, register_backend


def _in_turn(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
) -> int:
    """Quantizes weights one after the other, without a second copy of any: the grouped kernel of the torch backend."""
    for weight, out, scale, group_size in zip(weights, quantized, scales, group_sizes, strict=True):
        scale.copy_(quantize_dequantize(weight, replace(config, group_size=group_size), out=out)[1])
    return len(weights)


@dataclass
class Counts:
    """Counters of the ops since the process started, for reports; take the difference of two readings.

    Attributes:
        calls: the number of calls of either op, whatever the number of weights.
        launches: the number of launches of the backend's kernels, as :meth:`Backend.together` counts them; 1 for a call
            with one weight.
        elements: the number of elements that were quantized.
    """

    calls: int = 0
    launches: int = 0
    elements: int = 0

    def add(self, launches: int, elements: int) -> None:
        """Counts one more call."""
        self.calls, self.launches, self.elements = self.calls + 1, self.launches + launches, self.elements + elements


counts = Counts()


register_backend(
    Backend(
        name="torch",
        kernel=quantize_dequantize,
        unavailable=lambda device_type: None,
        spaces=tuple(SPACES),
        any_scale=True,
        grouped=_in_turn,
    )
)


# An op takes no objects: the quantizer is passed as its fields, in their order.
_SCHEMA = (
    "(Tensor weight, str space, SymInt group_size, float eps, str statistic, float scale_multiplier, Tensor? scale) "
    "-> (Tensor, Tensor)"
)


@torch.library.custom_op("bitcpm::fake_quantize", mutates_args=(), schema=_SCHEMA)
def _fake_quantize(weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *quantizer, scale = arguments
    config = QuantizerConfig(*quantizer)
    counts.add(1, weight.numel())
    return _backend(weight.device, config).kernel(weight, config, scale)


def _backend(device: torch.device, config: QuantizerConfig) -> Backend:
    backend = active_backend(device.type).backend
    backend.check(config, device.type)
    return backend


@_fake_quantize.register_fake
def _(weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, group_size, *_, scale = arguments
    group = check_weight(weight, group_size, scale)
    scales = weight.new_empty((weight.shape[0], weight.shape[1] // group), dtype=torch.bfloat16)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), scales


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - the autograd context has no public type
    ctx.mark_non_differentiable(output[1])


def _straight_through(ctx, grad_quantized, grad_scale):  # noqa: ANN001
    """Returns the gradient unchanged: the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432)."""
    return grad_quantized, *[None] * 6


_fake_quantize.register_autograd(_straight_through, setup_context=_setup_context)

# In place, `weights` is empty, because torch does not let an op write to an argument that it also gets as a read-only
# one. And torch does not functionalize an op that returns a list, so that the scales are written to arguments as well.
_SCHEMA_OF_ALL = (
    "(Tensor[] weights, Tensor(a!)[] quantized, Tensor(b!)[] scales, str space, int[] group_sizes, float eps, "
    "str statistic, float scale_multiplier) -> ()"
)


@torch.library.custom_op("bitcpm::fake_quantize_all", mutates_args=("quantized", "scales"), schema=_SCHEMA_OF_ALL)
def _fake_quantize_all(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    space: str,
    group_sizes: Sequence[int],
    *quantizer: Any,
) -> None:
    config = QuantizerConfig(space, -1, *quantizer)
    latent = weights or quantized
    _check_all(latent, quantized, scales, group_sizes)
    launches = 0
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, weight in enumerate(latent):
        kinds[weight.device, weight.dtype].append(i)
    for (device, _), chosen in kinds.items():
        ours, results, own = ([items[i] for i in chosen] for items in (latent, quantized, scales))
        sizes = [group_sizes[i] for i in chosen]
        launches += _backend(device, config).together(ours, results, own, sizes, config)
    counts.add(launches, sum(weight.numel() for weight in latent))


@_fake_quantize_all.register_fake
def _(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    space: str,
    group_sizes: Sequence[int],
    *quantizer: Any,
) -> None:
    _check_all(weights or quantized, quantized, scales, group_sizes)


def _check_all(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
) -> None:
    if not len(weights) == len(quantized) == len(scales) == len(group_sizes):
        raise ValueError(
            f"{len(weights)} weights, {len(quantized)} to be written, {len(scales)} scales and {len(group_sizes)} "
            "group sizes: pass as many of each"
        )
    for weight, out, scale, group_size in zip(weights, quantized, scales, group_sizes, strict=True):
        check_weight(weight, group_size, scale)
        for written, like in ((out, weight), (scale, scale)):
            if (written.shape, written.dtype, written.device) != (like.shape, like.dtype, weight.device):
                raise ValueError(
                    f"what is written has shape {tuple(written.shape)}, {written.dtype} on {written.device}: pass "
                    f"{tuple(like.shape)}, {like.dtype} on {weight.device}"
                )
            if not written.is_contiguous():
                raise ValueError(
                    f"what is written, of shape {tuple(written.shape)}, is not contiguous: pass one that is"
                )


def quantize_weight(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the quantized weight and its scales, computed by the backend of the weight's device.

    Args:
        weight: the latent weight, ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.
        scales: given bf16 scales ``[out, groups]``, or None for the weight's own.

    Returns:
        The quantized weight ``[out, in]`` in the weight's dtype, differentiable by the straight-through estimator, and
        the bf16 scales ``[out, groups]``.

    Raises:
        ValueError: if :func:`~bitcpm_megatron.quantization.weights.check_weight` refuses the weight, or the backend
            does not support the space or the scale.
    """
    quantizer = (config.space, config.group_size, config.eps, config.statistic, config.scale_multiplier)
    return torch.ops.bitcpm.fake_quantize(weight, *quantizer, scales)


@torch.no_grad()
def quantize_all(
    weights: Sequence[torch.Tensor], config: QuantizerConfig, group_sizes: Sequence[int] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Quantizes latent weights together, outside any graph.

    Args:
        weights: the latent weights, ``[out, in]`` each. Those of one dtype and device share launches.
        config: the quantizer of all of them.
        group_sizes: the group size of each weight, instead of the quantizer's.

    Returns:
        The quantized weights, contiguous, in the shapes and dtypes of the latent ones, and the bf16 scales
        ``[out, groups]`` of each.

    Raises:
        ValueError: if a weight or the quantizer is refused, as by :func:`quantize_weight`.
    """
    quantized = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    return quantized, _quantize_into(quantized, weights, config, group_sizes)


@torch.no_grad()
def quantize_in_place(
    weights: Sequence[torch.Tensor], config: QuantizerConfig, group_sizes: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Quantizes latent weights in place and together, without a second copy of any.

    Args:
        weights: the latent weights, ``[out, in]`` each, contiguous; overwritten. Those of one dtype and device share
            launches.
        config: the quantizer of all of them.
        group_sizes: the group size of each weight, instead of the quantizer's.

    Returns:
        The bf16 scales ``[out, groups]`` of each weight.

    Raises:
        ValueError: if a weight or the quantizer is refused, as by :func:`quantize_weight`, or a weight is not
            contiguous.
    """
    return _quantize_into(weights, [], config, group_sizes)


def _quantize_into(
    quantized: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    config: QuantizerConfig,
    group_sizes: Sequence[int] | None,
) -> list[torch.Tensor]:
    """Writes quantized weights, from ``weights`` or, if this is empty, in place; returns the scales."""
    if not quantized:
        return []
    sizes = [config.group_size] * len(quantized) if group_sizes is None else list(group_sizes)
    scales = [
        w.new_empty((w.shape[0], w.shape[1] // check_weight(w, size)), dtype=torch.bfloat16)
        for w, size in zip(quantized, sizes, strict=True)
    ]
    torch.ops.bitcpm.fake_quantize_all(
        weights, quantized, scales, config.space, sizes, config.eps, config.statistic, config.scale_multiplier
    )
    return scales


def fake_quantize(weight: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """Returns the quantized weight, differentiable by the straight-through estimator.

    Args:
        weight: the latent weight, ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.

    Returns:
        The quantized weight, in the shape and dtype of ``weight``, equal to
        ``dequantize(*quantize(weight, config), config, weight.dtype)`` bit for bit. Its gradient with respect to
        ``weight`` is the identity.

    Raises:
        ValueError: if the weight or the quantizer is refused, as by :func:`quantize_weight`.
        TypeError: if the weight is not a tensor, or the quantizer is not a configuration.
    """
    check_config(config)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a weight is a tensor [out, in], not a {type(weight).__name__}")
    return quantize_weight(weight, config)[0]
