# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a ternary weight whose products are int8 GEMMs, inside an unchanged upstream linear.

Upstream multiplies by the weight that it finds: ``torch.matmul(input, weight.t())`` in the forward,
``grad_output.matmul(weight)`` in the backward. The stand-in intercepts these calls (``__torch_function__``) and
computes them from its codes; gathering, reducing, fused weight gradients and everything else stay upstream's. In all
other calls it acts as the quantized weight that it holds.

In shapes, ``in`` and ``out`` are the features of the layer, and ``...`` the dimensions of the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from ..ops.int8 import QuantizedTokens, codes_of, int8_input_gradient, int8_linear, quantize_tokens

_TRANSPOSED = (torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
_TRANSPOSE = (torch.transpose, torch.Tensor.transpose)
_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


@dataclass
class Int8Gradients:
    """Counts of a layer's input gradients so far, over all its forward passes.

    Attributes:
        computed: the number of gradients that were computed as int8 GEMMs.
        passed: the number of gradients that reached the layer's input.
    """

    computed: int = 0
    passed: int = 0


class Int8Product:
    """The int8 products of one forward pass of a layer and of its backward.

    Args:
        name: the name of the layer.
        codes: the codes, int8 ``[out, in]``, and scales ``[out]`` of the weight; None to take them from the weight at
            each use.
        gradients: the counts of the layer, if its input gradient is an int8 GEMM as well; else None.

    Attributes:
        tokens: the layer's input in int8, while its forward runs.
        count: the number of forward products so far.
    """

    def __init__(
        self, name: str, codes: tuple[torch.Tensor, torch.Tensor] | None, gradients: Int8Gradients | None
    ) -> None:
        self.name = name
        self.codes = codes
        self.gradients = gradients
        self.tokens: QuantizedTokens | None = None
        self.count = 0
        self._version = 0

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes and keeps the layer's input ``[..., in]``; returns the values that its codes represent."""
        self.tokens = quantize_tokens(x)
        values = self.tokens.values
        assert values is not None  # quantize_tokens makes them
        self._version = _version(values)
        return values

    def of(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the codes and scales of the weight."""
        return codes_of(weight) if self.codes is None else self.codes

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Computes the layer's output ``[..., out]`` from its input ``[..., in]``.

        Raises:
            RuntimeError: if the input has another dtype than the weight.
        """
        if x.dtype != weight.dtype:
            raise RuntimeError(f"{self.name}: an input in {x.dtype} for a weight in {weight.dtype}: cast it")
        self.count += 1
        return int8_linear(self._known(x), *self.of(weight))

    def input_gradient(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Computes the input gradient ``[..., in]`` from the output gradient ``[..., out]``."""
        if self.gradients is None:
            return gradient.matmul(weight)
        self.gradients.computed += 1
        return int8_input_gradient(gradient, *self.of(weight))

    def gradient_passed(self) -> None:
        """Counts a complete input gradient, and checks that it was computed as requested.

        Raises:
            RuntimeError: if it was requested as an int8 GEMM and computed in another way.
        """
        if self.gradients is not None:
            self.gradients.passed += 1
            if self.gradients.computed < self.gradients.passed:
                self.gradients.passed = self.gradients.computed
                raise RuntimeError(
                    f"{self.name}: the input gradient was not computed as an int8 GEMM, for something put another "
                    "tensor in the place of the saved weight (saved-tensor hooks, non-reentrant recompute, a host's "
                    "own backward): use --ternary-gemm-backward bf16"
                )

    def _known(self, x: torch.Tensor) -> torch.Tensor | QuantizedTokens:
        """Returns the layer's input in int8 if ``x`` is that input: the same elements in memory, not written to since.

        Gathered activations are other elements than those that were quantized; their codes are found again, exactly.
        """
        tokens = self.tokens
        if tokens is None or tokens.values is None or _version(tokens.values) != self._version:
            return x
        same = x.is_contiguous() and x.shape == tokens.shape and x.data_ptr() == tokens.values.data_ptr()
        return tokens if same else x


def _version(values: torch.Tensor) -> int:
    """Returns torch's count of writes to a tensor; 0 for inference tensors, which have none."""
    return 0 if values.is_inference() else values._version


class Int8Weight(torch.Tensor):
    """The stand-in described in the module's docstring; :func:`as_int8` makes it."""

    __slots__ = ("product",)
    product: Int8Product

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Executes a torch function that is called with a stand-in."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            asked = args[0] if args else None
            if type(asked) is Int8Weight and (func in _TRANSPOSED or (func in _TRANSPOSE and _last_two(args))):
                # The transpose is part of the graph, for a linear that leaves the gradients to autograd.
                transposed = func(*args, **kwargs).as_subclass(Int8WeightTransposed)
                transposed.product = asked.product
                return transposed
            if len(args) > 1 and isinstance(args[1], Int8Weight):
                computed = _multiplied(func, *args, **kwargs)
                if computed is not None:
                    return computed
            return func(*args, **kwargs)


class Int8WeightTransposed(Int8Weight):
    """The transpose ``[in, out]`` of a stand-in."""

    __slots__ = ()


def as_int8(quantized: torch.Tensor, product: Int8Product) -> Int8Weight:
    """Returns a stand-in that shares the values of a quantized weight ``[out, in]``, outside any graph."""
    # It is not a view, because what is called on a view also reaches its base.
    made = torch.Tensor._make_subclass(Int8Weight, quantized)
    made.product = product
    return made


def _last_two(args: tuple) -> bool:
    return {d % 2 for d in args[1:]} == {0, 1}


def _multiplied(
    func: Callable[..., Any],
    x: torch.Tensor,
    weight: Int8Weight,
    *rest: Any,
    out: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor | None:
    """Returns the product with a stand-in, if that is what ``func`` computes; else None."""
    transposed = type(weight) is Int8WeightTransposed
    if func in _MATMUL and not rest and not more:
        y = _Int8Linear.apply(x, weight, False) if transposed else weight.product.input_gradient(x, weight)
    elif func is linear and not transposed:
        y = _Int8Linear.apply(x, weight, True)
        bias = rest[0] if rest else more.get("bias")
        y = y if bias is None else y + bias
    else:
        return None
    return y if out is None else out.copy_(y)


class _Int8Linear(torch.autograd.Function):
    """The product y = x W^T with gradients, for linears that leave these to autograd."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: Int8Weight, as_stored: bool) -> torch.Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        ctx.product, ctx.as_stored = weight.product, as_stored
        return weight.product.forward(x, weight if as_stored else weight.t())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        into = wgrad = None
        with torch._C.DisableTorchFunctionSubclass():
            if ctx.needs_input_grad[0]:
                into = ctx.product.input_gradient(gradient, weight if ctx.as_stored else weight.t())
            if ctx.needs_input_grad[1]:
                wgrad = gradient.reshape(-1, gradient.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1]))
                wgrad = wgrad if ctx.as_stored else wgrad.t()
        return into, wgrad, None
