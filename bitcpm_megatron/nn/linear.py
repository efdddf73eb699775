# SPDX-License-Identifier: Apache-2.0
"""The ternary linear: an unchanged upstream module whose ``forward`` uses the quantized weight.

The latent weight stays the module's parameter, so that names, sharding, optimizer and checkpoint keys are untouched.
The ``forward`` of the module *instance* is wrapped, not that of its class: this survives hosts that replace the class,
the linear function or ``_forward_impl`` (megatron-core 0.12.1 assigns the last one on the instance in every forward).
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch

from ..ops import fake_quantize, fake_quantize_activations, quantize_all, quantize_weight
from ..ops.int8 import codes_of
from ..quantization import QuantizerConfig, scales_of
from .cache import CacheEpoch
from .int8 import Int8Gradients, Int8Product
from .settings import CacheMode, Gemm
from .straight_through import pass_through, shadow
from .unpacked import free_until_backward

_ATTRIBUTE = "_ternary"

HostModule: TypeAlias = Any
"""A module of a host, whose attributes (``weight``, ``input_size``, ...) are not known to a type checker."""


class StaleCacheError(RuntimeError):
    """A cached quantized weight that does not match the latent weight."""


@dataclass
class TernaryState:
    """The state of a quantized module in addition to its latent weight.

    In shapes, ``out`` and ``in`` are the features of the local weight, and ``groups`` is the number of scales per row.

    Attributes:
        name: the module path with global layer numbers.
        config: the quantizer; its group size is the effective one of the local weight.
        epoch: the validity of the cache, shared by the model chunk.
        cache: ``step`` keeps one quantized weight per optimizer step, ``none`` quantizes in every forward.
        verify: whether to quantize again at every use of the cache and compare.
        like_all_layers: whether the same module of every other layer is quantized with the same number of groups.
        activation_groups: 0 to leave the layer's input alone; else the input is quantized to 8 bits per token, in this
            many groups of its features.
        gemm: ``int8`` multiplies the layer's input in int8 by the weight's codes; ``bf16`` multiplies both as they are
            stored.
        gemm_backward: ``int8`` does the same with the gradient of the output.
        quantized: the last quantized weight ``[out, in]``, or its blend on a ramp; kept only under ``step``.
        scales: its bf16 scales ``[out, groups]``.
        count: the number of quantizations so far, for reports.
        resident: whether the module's parameter holds the quantized weight itself, and the optimizer the latent one.
        unpack: writes the current quantized weight into a tensor ``[out, in]``, if it is kept packed and the parameter
            has no values; else None.
        used: whether a forward pass has run the layer since this was last reset; recompute in a backward pass does not
            count.
        made_in: the epoch of the cached quantized weight, and whether the layer was in training mode.
        codes: the codes, int8 ``[out, in]``, and scales ``[out]`` of the quantized weight, for ``gemm="int8"``; valid
            in ``codes_made_in``, and kept only if the quantized weight is.
        codes_made_in: the epoch of the codes, and whether the layer was in training mode.
        gradients: how many input gradients there were, and how many of them were int8 GEMMs.
    """

    name: str
    config: QuantizerConfig
    epoch: CacheEpoch
    cache: CacheMode = "step"
    verify: bool = False
    like_all_layers: bool = True
    activation_groups: int = 0
    gemm: Gemm = "bf16"
    gemm_backward: Gemm = "bf16"
    quantized: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    count: int = 0
    resident: bool = False
    unpack: Callable[[torch.Tensor], None] | None = None
    used: bool = False
    made_in: tuple[int, bool] | None = None
    codes: tuple[torch.Tensor, torch.Tensor] | None = None
    codes_made_in: tuple[int, bool] | None = None
    gradients: Int8Gradients = field(default_factory=Int8Gradients)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the quantized weight and scales of a latent weight, computed by the op outside any graph.

        Raises:
            StaleCacheError: if the parameters hold quantized weights already.
        """
        if self.resident:
            raise StaleCacheError(
                f"{self.name}: its parameter holds the quantized weight, and what was asked for needs the latent one: "
                "read weights inside Resident.latents(), or run with --ternary-cache step"
            )
        with torch.inference_mode(False), torch.no_grad():
            return quantize_weight(weight.detach(), self.config)

    def weight(self, latent: torch.Tensor, training: bool) -> torch.Tensor:
        """Returns the quantized weight to use at present: the cached one if it is valid, else a new one.

        Within a schedule, the first layer that asks quantizes all others of its cohort with its own weight.

        Args:
            latent: the latent weight, ``[out, in]``.
            training: whether the layer is in training mode.

        Raises:
            StaleCacheError: in verify mode, if the cached one does not match the latent weight.
        """
        quantized = self._cached(training)
        if quantized is not None:
            if self.verify:
                self._compare(latent, quantized)
            return quantized
        cohort = self.epoch.cohorts.get(self.name, ()) if self.epoch.open and self._waits(training) else ()
        others = [(s, m.weight, m.training) for s, m in cohort if s is not self and s._waits(m.training)]
        if others:
            _quantize_together([(self, latent, training), *others])
            return cast(torch.Tensor, self.quantized)
        # The old weight is dropped first, so that two never exist at once.
        self.quantized = None
        quantized, scales = self.quantize(latent)
        quantized = self._blend(latent, quantized)
        self._keep(quantized, scales, training)
        return quantized

    def _blend(self, latent: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """Returns the weight that the forward uses: the quantized one, or on a ramp W + ramp (Wq - W) in place."""
        if self.epoch.ramp == 1.0:
            return quantized
        with torch.inference_mode(False), torch.no_grad():
            return torch.lerp(latent.detach(), quantized, self.epoch.ramp, out=quantized)

    def _cached(self, training: bool) -> torch.Tensor | None:
        return self.quantized if self.epoch.open and self.made_in == (self.epoch.number, training) else None

    def _waits(self, training: bool) -> bool:
        """Returns whether a weight has to be quantized before its layer runs."""
        return self.cache == "step" and not self.resident and self._cached(training) is None

    def _keep(self, quantized: torch.Tensor, scales: torch.Tensor, training: bool) -> None:
        self.scales = scales
        self.count += 1
        if self.cache == "step":
            self.quantized, self.made_in = quantized, (self.epoch.number, training)

    def in_use(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the quantized weight and scales of the last forward, found from the parameter if none are kept."""
        if self.resident:
            held = self.held(weight)
            return held, scales_of(held, self.config)
        if self.quantized is not None and self.scales is not None and self.epoch.ramp == 1.0:
            return self.quantized, self.scales
        return self.quantize(weight)

    def held(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the quantized weight that a parameter represents: its values, or a newly unpacked tensor."""
        if self.unpack is None:
            return weight.detach()
        dense = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
        self.unpack(dense)
        return dense

    def product(self, quantized: torch.Tensor, training: bool) -> Int8Product | None:
        """Returns the int8 product of one forward pass and its backward; None if nothing is computed in int8.

        Args:
            quantized: the quantized weight of this forward, ``[out, in]``.
            training: whether the layer is in training mode.

        Raises:
            StaleCacheError: in verify mode, if kept codes are not those of the weight.
        """
        if self.gemm == "bf16":
            return None
        here = (self.epoch.number, training)
        if not self.epoch.open or self.unpack is not None or (self.cache == "none" and not self.resident):
            self.codes = self.codes_made_in = None
        elif self.codes_made_in != here:
            # The old codes are dropped first, so that two sets never exist at once.
            self.codes = None
            self.codes, self.codes_made_in = codes_of(quantized), here
        elif self.verify and self.codes is not None and not torch.equal(self.codes[0], codes_of(quantized)[0]):
            raise StaleCacheError(f"{self.name}: its int8 codes are not those of the quantized weight any more")
        return Int8Product(self.name, self.codes, self.gradients if self.gemm_backward == "int8" else None)

    def _compare(self, latent: torch.Tensor, cached: torch.Tensor) -> None:
        fresh = self._blend(latent, self.quantize(latent)[0])
        if not torch.equal(fresh, cached):
            changed = torch.ne(fresh, cached).sum().item()
            raise StaleCacheError(
                f"{self.name}: {changed} of {fresh.numel()} cached quantized weights no longer fit the latent weight. "
                "It was written during the optimizer step, probably through `.data`. Write weights only between "
                "steps, call CacheEpoch.invalidate() after writing them, or run with --ternary-cache none."
            )


def per_row(state: TernaryState) -> QuantizerConfig:
    """Returns the quantizer of a weight reshaped to one group per row; weights that share it are quantized together."""
    return replace(state.config, group_size=-1)


def _quantize_together(members: Sequence[tuple[TernaryState, torch.Tensor, bool]]) -> None:
    """Quantizes latent weights by one call of the op for each quantizer, and keeps the results in their states.

    Args:
        members: the state of each layer, its latent weight, and whether the layer is in training mode.
    """
    kinds: defaultdict[QuantizerConfig, list[tuple[TernaryState, torch.Tensor, bool]]] = defaultdict(list)
    for member in members:
        # The old quantized weights are dropped first, so that no weight ever has two.
        member[0].quantized = None
        kinds[per_row(member[0])].append(member)
    with torch.inference_mode(False):
        for config, alike in kinds.items():
            sizes = [state.config.group_size for state, _, _ in alike]
            made = quantize_all([latent.detach() for _, latent, _ in alike], config, sizes)
            for (state, latent, training), quantized, scales in zip(alike, *made, strict=True):
                state._keep(state._blend(latent, quantized), scales, training)


def ternary_state(module: torch.nn.Module) -> TernaryState | None:
    """Returns the state of a quantized module, or None."""
    return module.__dict__.get(_ATTRIBUTE)


def check_unwrapped(module: torch.nn.Module, name: str) -> None:
    """Checks that a module's forward can be wrapped.

    Raises:
        ValueError: if the module is quantized already, or its ``forward`` has another wrapper.
    """
    if ternary_state(module) is not None:
        raise ValueError(f"{name} is ternary already: apply_recipe() once per model")
    if "forward" in module.__dict__:
        raise ValueError(
            f"{name}: its forward is wrapped already ({module.__dict__['forward']!r}), so that the quantizer could be "
            "bypassed: apply the recipe before other wrappers"
        )


def make_ternary(module: torch.nn.Module, state: TernaryState) -> None:
    """Wraps ``module.forward`` so that it computes with the quantized weight.

    Args:
        module: a linear that holds its weight ``[out, in]`` as a parameter and reads it as ``self.weight``.
        state: the state of the module, which says how to quantize it.

    Raises:
        ValueError: if the module is quantized already, or its ``forward`` has another wrapper.
    """
    check_unwrapped(module, state.name)
    module.__dict__[_ATTRIBUTE] = state
    # This is a partial of a module-level function, because pickle would not find a bound method on the class again.
    # Copies of the module get their own partial, and it follows a later change of the class.
    forward = _untraced_forward if state.gemm == "int8" else _ternary_forward
    module.__dict__["forward"] = functools.partial(forward, module)


def _untraced_forward(self: HostModule, *args: Any, **kwargs: Any) -> Any:
    """Runs the ternary forward outside torch.compile, which cannot trace int8 GEMMs in place of torch's.

    The code around the layer is still compiled.
    """
    return _untraced()(self, *args, **kwargs)


@functools.cache
def _untraced() -> Callable[..., Any]:
    # This is deferred until it is needed, because it imports the compiler.
    return torch.compiler.disable(_ternary_forward)


def _ternary_forward(self: HostModule, *args: Any, **kwargs: Any) -> Any:
    state: TernaryState = self.__dict__[_ATTRIBUTE]
    if kwargs.get("weight") is not None or any(isinstance(a, torch.Tensor) for a in args[1:]):
        raise RuntimeError(f"{state.name}: a weight handed to forward() would bypass the quantizer")
    state.used = state.used or torch.compiler.is_compiling() or not _in_backward()
    latent = self.weight
    stand_in, product = _stand_in(self, state, latent)
    if state.activation_groups:
        if not args:
            raise RuntimeError(f"{state.name}: hand the input to forward() by position, so that it can be quantized")
        # The input is quantized before any gather of the sequence: a token's scale depends only on its own features.
        args = (_quantized_input(state, args[0], product), *args[1:])
    if stand_in is latent:
        return type(self).forward(self, *args, **kwargs)
    # Usually there is no such entry, because parameters are stored elsewhere; FSDP1 stores views of its flat parameter
    # here.
    before = self.__dict__.get("weight")
    self.__dict__["weight"] = stand_in
    try:
        if self.weight is not stand_in:
            raise RuntimeError(f"{state.name}: something, such as a parametrization, hides the quantized weight")
        result = type(self).forward(self, *args, **kwargs)
    finally:
        if before is None:
            del self.__dict__["weight"]
        else:
            self.__dict__["weight"] = before
        if product is not None:
            product.tokens = None
    if product is not None and not product.count:
        raise RuntimeError(
            f"{state.name}: this host multiplies with the weight in a way that no int8 GEMM can take the place of: "
            "use --ternary-gemm bf16"
        )
    if state.unpack is not None:
        free_until_backward(stand_in, result, state.unpack)
    return result


def _stand_in(
    module: HostModule, state: TernaryState, latent: torch.nn.Parameter
) -> tuple[torch.Tensor, Int8Product | None]:
    """Returns the tensor that replaces the parameter in a forward, and its int8 product or None.

    The tensor is the parameter itself if that holds the quantized weight.
    """
    if state.epoch.ramp != 1.0:
        _refuse_on_a_ramp(state)
    if torch.compiler.is_compiling():
        return _traceable_stand_in(module, state, latent), None
    if state.resident and state.unpack is None and state.gemm == "bf16":
        # The gradient of the parameter is already that of the latent weight, so that no stand-in is needed.
        return latent, None
    quantized = state.held(latent) if state.resident else state.weight(latent, module.training)
    product = state.product(quantized, module.training)
    return shadow(latent, quantized, getattr(module, "gradient_accumulation_fusion", False), product), product


def _refuse_on_a_ramp(state: TernaryState) -> None:
    found = {
        "its parameter holds the quantized weight alone: use --ternary-cache step": state.resident,
        "an int8 GEMM has no codes for what lies between: use --ternary-gemm bf16": state.gemm == "int8",
        "torch.compile would keep the ramp of its first trace: leave one of the two out": torch.compiler.is_compiling(),
    }
    for why, stands_against in found.items():
        if stands_against:
            raise RuntimeError(
                f"{state.name}: on a ramp a forward needs the latent weight and the quantized one; {why}"
            )


def _quantized_input(state: TernaryState, x: torch.Tensor, product: Int8Product | None) -> torch.Tensor:
    if product is None:
        return fake_quantize_activations(x, state.activation_groups)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # the dtype that the product would be computed in
    return pass_through(x, product)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _traceable_stand_in(module: HostModule, state: TernaryState, latent: torch.nn.Parameter) -> torch.Tensor:
    """Returns the registered op's result, without cache, under torch.compile: same values, a traceable gradient."""
    if state.unpack is not None:
        raise RuntimeError(f"{state.name}: torch.compile cannot trace packed weights: use --ternary-cache resident")
    if state.resident:
        return latent
    if getattr(module, "gradient_accumulation_fusion", False):
        raise RuntimeError(
            f"{state.name}: torch.compile cannot trace gradient-accumulation fusion: switch one of the two off"
        )
    return fake_quantize(latent, state.config)
