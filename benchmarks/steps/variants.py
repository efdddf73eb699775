# SPDX-License-Identifier: Apache-2.0
"""Variants that are compared: BF16, ternary, and the quantizers of other projects in the same linear layers.

A peer is used in the same way as our quantizer: the ``forward`` of a module is wrapped, and the linear multiplies by
the weight that the peer computes from the latent weight. It quantizes in every forward pass, as its own code does; no
peer has a cache.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from bitcpm_megatron.parallel.linears import candidates

CACHES = {
    "none": "quantized in every micro-batch",
    "step": "quantized once per optimizer step, beside the latent weight",
    "resident": "quantized behind the optimizer, in the parameter itself",
}
"""Values of ``--ternary-cache``, the place of the quantized weights, which name variants -> a note on each."""
PACKED_GATHER, PACKED = "packed-gather", "packed"
"""Further variants, which need the distributed optimizer."""
A8, INT8, INT8_BACKWARD = "a8", "int8", "int8-backward"
"""Variants with int8 activations (W1.58A8): bf16 GEMMs, int8 in the forward, and int8 for input gradients, too."""
_A8 = ("--ternary", "--ternary-activation-bits", "8")
_INT8 = (*_A8, "--ternary-gemm", "int8")
Quantizer = Callable[[torch.Tensor], torch.Tensor]
"""Function from a latent weight ``[out, in]`` (output and input features) to the differentiable weight of the GEMM.

The quantizer of a variant with ``whole_linear`` takes an input and a latent weight, and returns the linear's output.
"""


@dataclass(frozen=True)
class Variant:
    """A way to train the same model.

    Attributes:
        name: the name of the variant in tables.
        flags: the variant's flags of our training loop.
        make_quantizer: a function that creates a peer's quantizer; None for BF16 and our own variants.
        whole_linear: whether the peer replaces the GEMM as well, and so does not support tensor parallelism.
        package: the package that must be installed, or None.
        note: a note on the variant for tables.
    """

    name: str
    flags: tuple[str, ...] = ()
    make_quantizer: Callable[[], Quantizer] | None = None
    whole_linear: bool = False
    package: str | None = None
    note: str = ""

    @property
    def ternary(self) -> bool:
        """True if the variant is our own ternary training."""
        return "--ternary" in self.flags

    def unavailable(self, tensor_parallel: int) -> str | None:
        """Returns the reason why the variant cannot run here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install 'bitcpm_megatron[peers]'"
        if self.whole_linear and tensor_parallel > 1:
            return "replaces the whole linear, which it has at TP1 only"
        return None


def _bitcpm_residual() -> Quantizer:
    """Creates the fake quantizer of the BitCPM-CANN report as written: ``W + stopgrad(Wq - W)``, one scale per row."""

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().mean(dim=-1, keepdim=True).clamp(min=1e-5)
        quantized = (weight / scale).round().clamp(-1, 1) * scale
        return weight + (quantized - weight).detach()

    return quantize


def _transformers() -> Quantizer:
    """Returns ``transformers.integrations.bitnet.WeightQuant``, which its authors compile; one scale per tensor."""
    from transformers.integrations.bitnet import WeightQuant

    return WeightQuant.apply


def _transformers_linear() -> Quantizer:
    """Creates the training forward of ``transformers.integrations.bitnet.AutoBitLinear``.

    It consists of ``WeightQuant``, ``ActQuant`` and a BF16 GEMM.
    """
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    return lambda x, weight: F.linear(ActQuant.apply(x), WeightQuant.apply(weight))


def _torchao() -> Quantizer:
    """Creates the weight quantizer of torchao's BitNet training: one scale per tensor, cast back for a BF16 GEMM."""
    from torchao.prototype.quantized_training.bitnet import get_bitnet_scale, quantize_bitnet_weight

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        scale = get_bitnet_scale(weight)
        return quantize_bitnet_weight(weight, scale).to(weight.dtype) * scale.to(weight.dtype)

    return functools.partial(_StraightThrough.apply, quantize)


def _torchao_linear() -> Quantizer:
    """Creates torchao's whole BitNet training linear: quantized weight, int8 activations and an int8 GEMM."""
    from torchao.prototype.quantized_training.bitnet import BitNetTrainingLinearWeight, _BitNetTrainingLinear

    class Linear(torch.autograd.Function):
        """Adapter that gives torchao the plain latent parameter in torchao's wrapper, and returns its gradient."""

        @staticmethod
        def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:  # noqa: ANN001
            return _BitNetTrainingLinear.forward(ctx, x, BitNetTrainingLinearWeight(weight), bias)

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN001
            return _BitNetTrainingLinear.backward(ctx, grad)

    return lambda x, weight: Linear.apply(x, weight, None)


def _compiled() -> Quantizer:
    """Creates the definition of our quantizer compiled by torch.compile, with one scale per row and without a cache."""

    @torch.compile
    def quantize(weight: torch.Tensor) -> torch.Tensor:
        w = weight.float()
        scale = w.abs().mean(dim=-1, keepdim=True).clamp(min=1e-5).bfloat16().float()
        return ((w / scale).round().clamp(-1, 1) * scale).to(weight.dtype)

    return functools.partial(_StraightThrough.apply, quantize)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, quantize: Quantizer, weight: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
        return quantize(weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor]:  # noqa: ANN001
        return None, grad


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bf16", note="megatron-core's own linears"),
        Variant("ternary", ("--ternary",), note="with the default cache"),
        *(Variant(cache, ("--ternary", "--ternary-cache", cache), note=note) for cache, note in CACHES.items()),
        Variant(
            PACKED_GATHER,
            ("--ternary", "--ternary-cache", "resident", "--ternary-param-gather", "packed"),
            note="resident, gathered as 2-bit codes and scales",
        ),
        Variant(PACKED, ("--ternary", "--ternary-cache", PACKED), note="2-bit codes and scales, unpacked at each use"),
        Variant(A8, _A8, note="int8 activations, one scale per token, bf16 GEMMs"),
        Variant(INT8, _INT8, note="the same as int8 GEMMs in the forward"),
        Variant(INT8_BACKWARD, (*_INT8, "--ternary-gemm-backward", "int8"), note="and for the input gradients"),
        Variant("bitcpm-residual", (), _bitcpm_residual, note="the report's formula in eager PyTorch"),
        Variant("compiled", (), _compiled, note="torch.compile of the definition"),
        Variant("transformers", (), _transformers, package="transformers", note="WeightQuant, one scale per tensor"),
        Variant(
            "transformers-linear",
            (),
            _transformers_linear,
            True,
            "transformers",
            "WeightQuant and ActQuant, int8 activations, a BF16 GEMM",
        ),
        Variant("torchao", (), _torchao, package="torchao", note="its weight quantizer, one scale per tensor"),
        Variant("torchao-linear", (), _torchao_linear, True, "torchao", "its int8 training linear, int8 activations"),
    )
}
PEERS = tuple(name for name, variant in VARIANTS.items() if variant.make_quantizer is not None)


def install_peer(variant: Variant, chunk: torch.nn.Module) -> int:
    """Installs a peer's quantizer in every linear that our ternary training would quantize.

    Args:
        variant: the variant of the peer.
        chunk: a bare model chunk.

    Returns:
        The number of linears in which it is installed.

    Raises:
        RuntimeError: if the peer does not support the tensor parallelism, or gradient accumulation is fused.
    """
    quantizer = variant.make_quantizer()
    if variant.whole_linear and parallel_state.get_tensor_model_parallel_world_size() > 1:
        raise RuntimeError(f"{variant.name} replaces the whole linear, without its collectives: TP1 only")
    forward = _whole_forward if variant.whole_linear else _peer_forward
    linears = [c.module for c in candidates(chunk) if c.kind in ("column", "row")]
    for module in linears:
        if getattr(module, "gradient_accumulation_fusion", False):
            raise RuntimeError("peers know no gradient-accumulation fusion: --no-gradient-accumulation-fusion for all")
        module.forward = functools.partial(forward, module, quantizer)
    return len(linears)


def _peer_forward(module: torch.nn.Module, quantizer: Quantizer, *args, **kwargs):
    quantized = quantizer(module.weight)
    module.__dict__["weight"] = quantized
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        del module.__dict__["weight"]


def _whole_forward(module: torch.nn.Module, linear: Callable, x: torch.Tensor, *args, **kwargs):
    return linear(x, module.weight), None


def check_peers_use_their_weight(chunk: torch.nn.Module) -> None:
    """Checks that no linear that has to be quantized computes with its latent weight.

    Raises:
        RuntimeError: if a linear does.
    """
    for candidate in candidates(chunk):
        if candidate.kind not in ("column", "row"):
            continue
        module = candidate.module
        x = torch.randn(2, 1, module.weight.shape[1], device=module.weight.device).to(module.weight.dtype)
        with torch.no_grad():
            if torch.equal(module(x)[0], F.linear(x, module.weight)):
                raise RuntimeError(f"{candidate.path} computes with its latent weight")
