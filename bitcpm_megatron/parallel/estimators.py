# SPDX-License-Identifier: Apache-2.0
"""Estimators of the gradient through the quantizer, which the optimizer takes as the gradient of a latent weight.

The gradient with respect to a quantized weight, summed over micro-batches and reduced over ranks, is in its
``main_grad`` when the optimizer steps, and during a step the latent weight W and its scale s do not change. So an
estimator that is elementwise in W, s and the gradient is one product per optimizer step, before the norm and the
clipping. It works however the gradient was computed: fused into ``main_grad``, overlapped with the backward pass, or
scattered over the shards of the distributed optimizer, each of which is multiplied by its slice of the factors. Inside
the straight-through function an estimator would do nothing under gradient-accumulation fusion, which bypasses that
function.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..nn.linear import TernaryState
from ..nn.settings import Estimator
from ..quantization import QuantizerConfig, effective_group
from ..quantization.spaces import SPACES, Space
from .probe import ternary_modules
from .resident import find_resident, optimizers_of

Factor: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Space], torch.Tensor]
"""A function from fp32 weights ``[n]`` and their scales ``[n]`` to the factors ``[n]`` of their gradient.

n is the number of elements of a block; the third argument is the quantization space.
"""

# The factors of a weight are computed block by block, so that they take 16 MiB.
_BLOCK_ELEMENTS = 1 << 22


class EstimatorError(ValueError):
    """A run whose gradients cannot be shaped by an estimator."""


def clipped(w: torch.Tensor, s: torch.Tensor, space: Space) -> torch.Tensor:
    """Returns whether each weight is at most half a step beyond the outermost levels; elsewhere the gradient is zero.

    For ternary this is ``|W| <= 1.5 s``: where the quantizer clamps by more than it rounds, moving W changes only the
    scale. The mask is that of the clipped straight-through estimator (Hubara et al., "Quantized Neural Networks", 2016:
    the gradient times ``1[|r| <= 1]``), with the range of ``torch.fake_quantize_per_channel_affine``, whose gradient
    passes where ``round(W / s)`` is a level. In fp32 the bounds are exact, and a weight on one of them keeps its
    gradient.

    Args:
        w: the latent weights, fp32 ``[n]``.
        s: their scales, fp32 ``[n]``, each of them a bf16 number.
        space: the space that they are quantized to.

    Returns:
        The mask, bool ``[n]``.
    """
    below, above = _reach(space)
    return (w >= s * below) & (w <= s * above)


ESTIMATORS: Mapping[str, Factor] = {"clipped": clipped}
"""The estimators by the name after ``--ternary-estimator``; ``identity`` does nothing and has no entry."""


def shape_gradients(chunks: Sequence[torch.nn.Module], optimizer: Any, estimator: Estimator) -> str | None:
    """Makes an optimizer step with the gradients that an estimator makes of the straight-through ones.

    Call it after the optimizer is built, after :func:`~.resident.hold_in_parameters` or without it. It wraps the
    optimizer's ``step``, which computes norm, clipping and update from ``main_grad``.

    Args:
        chunks: the model chunks of this rank, wrapped in DDP, after :func:`~.apply.apply_recipe`.
        optimizer: the optimizer that trains them, as ``get_megatron_optimizer`` builds it.
        estimator: ``identity``, which changes nothing, or a name in :data:`ESTIMATORS`.

    Returns:
        One line for the log; None for ``identity``.

    Raises:
        EstimatorError: if there is no ``main_grad`` to shape, or the optimizer does not step with it.
    """
    if estimator == "identity":
        return None
    if estimator not in ESTIMATORS:
        raise EstimatorError(f"estimator {estimator!r} is unknown: use identity or one of {', '.join(ESTIMATORS)}")
    _check(chunks, optimizer, estimator)
    optimizer.step = functools.partial(_step, optimizer.step, list(chunks), ESTIMATORS[estimator])
    return f"estimator: {estimator}, once per optimizer step, in front of the gradient's norm"


def _step(original: Callable[[], Any], chunks: Sequence[torch.nn.Module], factor: Factor) -> Any:
    for state, parameter, latent, start in _latents(chunks):
        _shape(state, parameter, latent, start, factor)
    return original()


def _latents(
    chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[TernaryState, torch.nn.Parameter, torch.Tensor, int]]:
    """Yields the state, parameter, flat latent values and first element of every trained, quantized weight.

    If the parameters hold quantized weights, the latent values are this rank's masters, only of its shard, which begins
    at the first element; the rank has no reduced gradient of other elements either.
    """
    resident = find_resident(chunks[0])
    if resident is not None and resident.holds:
        for share, master in resident.masters():
            yield share.state, share.parameter, master, share.start
    else:
        for state, module in ternary_modules(chunks):
            if module.weight.requires_grad:
                yield state, module.weight, module.weight.detach().view(-1), 0


@torch.no_grad()
def _shape(
    state: TernaryState, parameter: torch.nn.Parameter, latent: torch.Tensor, start: int, factor: Factor
) -> None:
    scales, ramp = state.in_use(parameter)[1].flatten(), state.epoch.ramp
    group = effective_group(parameter.shape[1], state.config.group_size)
    gradient = parameter.main_grad.view(-1)  # type: ignore[attr-defined] # DDP's
    for first in range(start, start + latent.numel(), _BLOCK_ELEMENTS):
        last = min(first + _BLOCK_ELEMENTS, start + latent.numel())
        # The latent value is rounded to what the forward used, because a master has more digits.
        w = latent[first - start : last - start].to(parameter.dtype).float()
        cut = scales[first // group : (last - 1) // group + 1].float()
        s = cut.repeat_interleave(group)[first % group :][: last - first]
        of_quantizer = factor(w, s, SPACES[state.config.space])
        # On a ramp, the rest of the weight that the forward used is the latent weight itself.
        whole = of_quantizer if ramp == 1.0 else 1.0 - ramp + ramp * of_quantizer
        # This multiplies instead of filling with zeros, so that values that are not finite do not go unnoticed.
        gradient[first:last].mul_(whole)


def _check_reach(state: TernaryState, estimator: str) -> None:
    """Refuses quantizers that leave nothing to clip, or only what rounding decides.

    The levels under a scale from a group's maximum may reach beyond that maximum; the tolerance is that of a bf16
    scale, which has 8 binary digits.
    """
    config, space = state.config, SPACES[state.config.space]
    below, above = _reach(space)
    if config.statistic == "absmax" and config.scale_multiplier * min(-below, above) > 1 - 2**-7:
        raise EstimatorError(
            f"{state.name}: the levels of {space.name} reach all weights of a group whose scale is "
            f"{config.scale_multiplier:g} times its maximum, so that {estimator} would do nothing: use "
            "--ternary-statistic absmean, another --ternary-scale-multiplier, or --ternary-estimator identity"
        )


def _reach(space: Space) -> tuple[float, float]:
    """Returns the bounds half a step beyond the outermost levels, in units of the scale."""
    low, high = space.levels[0], space.levels[-1]
    return low - (space.levels[1] - low) / 2, high + (high - space.levels[-2]) / 2


def _shows_its_scales(config: QuantizerConfig) -> bool:
    """Returns whether the scale of every group can be read from its quantized weights.

    In ternary, the scale is their largest magnitude, unless all of them are zero. A mean does not exceed the maximum,
    so that all are zero only if the scale is the lower bound eps.
    """
    return config.space == "ternary" and config.statistic == "absmean" and config.scale_multiplier <= 1.0


def _check(chunks: Sequence[torch.nn.Module], optimizer: Any, estimator: str) -> None:
    cure = "use --ternary-estimator identity"
    for part in optimizers_of(optimizer):
        method = getattr(type(part), "prepare_grads", None)
        if method is None or not method.__module__.startswith("megatron.core."):
            where = "of its own" if method is None else f"that {method.__module__} has put there"
            raise EstimatorError(
                f"{type(part).__name__} takes gradients in a way {where}, and was not proved to take those of the "
                f"estimator {estimator}: {cure}"
            )
    resident = find_resident(chunks[0])
    for state, module in ternary_modules(chunks):
        if not module.weight.requires_grad:
            continue
        _check_reach(state, estimator)
        if resident is not None and resident.holds and not _shows_its_scales(state.config):
            raise EstimatorError(
                f"{state.name}: some groups may hide their scale in the quantized weights, which are all that "
                f"is there: use --ternary-cache step, or {cure}"
            )
        if not hasattr(module.weight, "main_grad"):
            raise EstimatorError(
                f"{state.name}: its gradient is in no buffer of megatron-core's DDP, where the estimator {estimator} "
                f"would shape it: wrap the model before, or {cure}"
            )
