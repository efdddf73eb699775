# SPDX-License-Identifier: Apache-2.0
"""The stand-in for a latent weight inside a linear's forward: quantized values, the latent parameter's gradient path.

megatron-core's linear function writes weight gradients straight into ``weight.main_grad`` when gradient-accumulation
fusion is on, sets ``weight.grad_added_to_main_grad`` and returns a dummy gradient, so that DDP's hook still fires. So
the stand-in must carry the latent parameter's attributes, and what is set on it must be seen on the parameter.
"""

import torch

from .int8 import Int8Product, as_int8


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        weight: torch.Tensor,
        quantized: torch.Tensor,
        product: Int8Product | None = None,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        # An alias of an input, not the input: returning `quantized` itself would put the cache into the graph. And no
        # view of it: views of a view ask its base, the cache, whether they require a gradient. torch.matmul would then
        # take another way than for a parameter, and copy the weight once per token where a micro-batch is one sequence.
        return _alias(quantized, product)

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN001
        ctx.shadow = None
        # A pure pass-through: under fusion the gradient is in main_grad already and `grad` is a dummy.
        return grad, None, None


def shadow(
    weight: torch.nn.Parameter, quantized: torch.Tensor, fused: bool, product: Int8Product | None = None
) -> torch.Tensor:
    """A tensor with the values of ``quantized`` that stands for ``weight`` in a linear's forward and backward.

    Args:
        weight: the latent parameter ``[out, in]``; its gradient is the one of the result, unchanged.
        quantized: its quantized values, same shape and dtype, outside any graph. Not copied.
        fused: whether gradient-accumulation fusion will reach for the attributes in the backward pass.
        product: computes what the result is multiplied with; None for torch.

    Returns:
        An alias of ``quantized``. It shares the attribute dictionary of ``weight`` (``main_grad``, parallel marks) both
        ways. Frozen weights give a tensor that requires no gradient.
    """
    if not weight.requires_grad:
        stand_in = _alias(quantized, product)
    elif not torch.is_grad_enabled():
        # Also the first pass of activation recompute. Upstream takes its frozen-weight branch for a weight that does
        # not require a gradient, and would compute something else than in the second pass.
        stand_in = _alias(quantized, product).requires_grad_(True)
    else:
        stand_in = _StraightThrough.apply(weight, quantized, product)
        if fused:
            # Upstream's backward reaches the attributes through the saved tensor: its Python half must live until then.
            # Only then, for a graph that never runs backward (non-reentrant recompute makes such) would keep it alive.
            stand_in.grad_fn.shadow = stand_in
    stand_in.__dict__ = weight.__dict__
    return stand_in


def pass_through(x: torch.Tensor, product: Int8Product) -> torch.Tensor:
    """A layer's input ``[..., in]`` quantized, with its gradient unchanged: the straight-through estimator."""
    return _PassThrough.apply(x, product)


class _PassThrough(torch.autograd.Function):
    """Of activations; another class than that of weights, see :func:`is_shadow`."""

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
    """Whether a tensor of a graph is what :func:`shadow` gave for a weight that is trained, or a view of it.

    It has a gradient function, which a parameter has not: what takes tensors without one for weights, takes this one
    for an activation.
    """
    whole = tensor if tensor._base is None else tensor._base
    return isinstance(whole.grad_fn, _StraightThrough._backward_cls)
