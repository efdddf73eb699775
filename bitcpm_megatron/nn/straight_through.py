# SPDX-License-Identifier: Apache-2.0
"""The stand-in for a latent weight inside a linear's forward: quantized values, with the latent parameter's gradient.

With gradient-accumulation fusion, megatron-core's linear function writes weight gradients directly into
``weight.main_grad``, sets ``weight.grad_added_to_main_grad`` and returns a dummy gradient, so that DDP's hook still
fires. Therefore the stand-in must have the latent parameter's attributes, and attributes set on it must be visible on
the parameter.
"""

import torch

from .int8 import Int8Product, as_int8


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        weight: torch.Tensor,
        quantized: torch.Tensor,
        product: Int8Product | None = None,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        # The result is an alias of an input, because returning `quantized` itself would put the cache into the graph.
        # It is not a view, because views of a view take requires_grad from its base, the cache. torch.matmul would then
        # take another path than for a parameter, and copy the weight once per token if a micro-batch is one sequence.
        return _alias(quantized, product)

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN001
        ctx.shadow = None
        # The gradient passes unchanged: under fusion it is already in main_grad, and `grad` is a dummy.
        return grad, None, None


def shadow(
    weight: torch.nn.Parameter, quantized: torch.Tensor, fused: bool, product: Int8Product | None = None
) -> torch.Tensor:
    """Returns a tensor with the values of ``quantized`` that replaces ``weight`` in a linear's forward and backward.

    Args:
        weight: the latent parameter, ``[out, in]``; its gradient is that of the result, unchanged.
        quantized: its quantized values, in the same shape and dtype, outside any graph. They are not copied.
        fused: whether the backward of gradient-accumulation fusion will read the attributes.
        product: computes the products with the result in int8; None to leave them to torch.

    Returns:
        An alias of ``quantized``. It shares the attribute dictionary of ``weight`` (``main_grad``, parallel marks) both
        ways. For a frozen weight it is a tensor that requires no gradient.
    """
    if not weight.requires_grad:
        stand_in = _alias(quantized, product)
    elif not torch.is_grad_enabled():
        # This is also the first pass of activation recompute. For a weight that requires no gradient, upstream takes
        # its frozen-weight branch, which would compute something else than the second pass.
        stand_in = _alias(quantized, product).requires_grad_(True)
    else:
        stand_in = _StraightThrough.apply(weight, quantized, product)
        if fused:
            # Upstream's backward reads the attributes through the saved tensor, whose Python object must live until
            # then. It is kept only under fusion, because a graph whose backward never runs (non-reentrant recompute
            # makes such graphs) would keep it alive.
            stand_in.grad_fn.shadow = stand_in
    stand_in.__dict__ = weight.__dict__
    return stand_in


def pass_through(x: torch.Tensor, product: Int8Product) -> torch.Tensor:
    """Returns a layer's quantized input ``[..., in]``, with an unchanged gradient: the straight-through estimator."""
    return _PassThrough.apply(x, product)


class _PassThrough(torch.autograd.Function):
    """The straight-through estimator of activations, separate so that :func:`is_shadow` does not match it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, product: Int8Product) -> torch.Tensor:  # noqa: ANN001
        ctx.product = product
        return product.quantize(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN001
        ctx.product.gradient_passed()
        return grad, None


def _alias(quantized: torch.Tensor, product: Int8Product | None) -> torch.Tensor:
    return quantized.detach() if product is None else as_int8(quantized, product)


def is_shadow(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor of a graph is the stand-in of a trained weight from :func:`shadow`, or a view of it.

    A stand-in has a gradient function, which a parameter does not have. Code that recognizes weights by having no
    gradient function takes a stand-in for an activation.
    """
    whole = tensor if tensor._base is None else tensor._base
    return isinstance(whole.grad_fn, _StraightThrough._backward_cls)
