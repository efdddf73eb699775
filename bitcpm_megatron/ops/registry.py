# SPDX-License-Identifier: Apache-2.0
"""Registry of the backends of ``bitcpm::fake_quantize``: which ones exist, which one runs, and why."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..quantization import QuantizerConfig

Kernel = Callable[[torch.Tensor, QuantizerConfig, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""The signature ``(weight, config, scales or None) -> (quantized, scales)`` of a kernel for one weight.

It computes the same function as :func:`bitcpm_megatron.quantization.quantize_dequantize`.
"""
GroupedKernel = Callable[
    [Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[int], QuantizerConfig], int
]
"""The signature ``(weights, quantized, scales, group_sizes, config) -> launches`` of a kernel for many weights.

The arguments are those of :meth:`Backend.together`.
"""


@dataclass(frozen=True)
class Backend:
    """One implementation of ``bitcpm::fake_quantize``.

    Attributes:
        name: the name that users type after ``--ternary-backend``.
        kernel: the implementation for one weight.
        unavailable: a function that returns why the backend cannot run on a device type (``"cpu"``, ``"cuda"``,
            ``"npu"``), or None if it can.
        priority: the rank of the backend for ``auto``, which takes the available one with the highest priority; None
            for a backend that runs only if it is requested by name.
        spaces: the quantization spaces that it supports.
        any_scale: whether it makes scales of every statistic and multiplier; else only of the absmean times 1.
        grouped: an implementation that quantizes many weights in few launches; None if they are quantized one by one.
    """

    name: str
    kernel: Kernel
    unavailable: Callable[[str], str | None]
    priority: int | None = 0
    spaces: tuple[str, ...] = ("ternary",)
    any_scale: bool = False
    grouped: GroupedKernel | None = None

    def knows(self, config: QuantizerConfig) -> bool:
        """Returns whether the backend supports a quantizer."""
        return config.space in self.spaces and (self.any_scale or config.of_absmean)

    def check(self, config: QuantizerConfig, device_type: str) -> None:
        """Checks that the backend supports a quantizer.

        Raises:
            ValueError: if it does not; the message names space or scale, and the backends of the device type that
                support it.
        """
        if self.knows(config):
            return
        what = f"makes scales of absmean alone, not of {config.scale}"
        if config.space not in self.spaces:
            what = f"quantizes to {', '.join(self.spaces)}, not to {config.space!r}"
        others = [b.name for b in backends() if b.knows(config) and b.unavailable(device_type) is None]
        cure = f"--ternary-backend {' or '.join(others)}" if others else "quantize and dequantize"
        raise ValueError(f"the backend {self.name} {what}: use {cure}")

    def together(
        self,
        weights: Sequence[torch.Tensor],
        quantized: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        group_sizes: Sequence[int],
        config: QuantizerConfig,
    ) -> int:
        """Quantizes weights in as few launches as the backend can.

        Args:
            weights: the latent weights, ``[out, in]`` each, of one dtype on one device.
            quantized: the tensors to write the quantized weights to, contiguous, of the weights' shapes and dtype; each
                may be the weight itself.
            scales: the tensors to write the scales to, bf16 ``[out, groups]`` each, contiguous.
            group_sizes: the elements per scale of each weight, -1 for the row.
            config: the quantizer of all of them; its group size is ignored.

        Returns:
            The number of launches of the backend's kernels.
        """
        if self.grouped is not None:
            return self.grouped(weights, quantized, scales, group_sizes, config)
        for weight, result, scale, group_size in zip(weights, quantized, scales, group_sizes, strict=True):
            values, own = self.kernel(weight, replace(config, group_size=group_size), None)
            result.copy_(values)
            scale.copy_(own)
        return len(weights)


@dataclass(frozen=True)
class Choice:
    """The backend that serves a device type, and the reason in words."""

    backend: Backend
    reason: str


_BACKENDS: dict[str, Backend] = {}
_requested = "auto"
_choices: dict[str, Choice] = {}


def register_backend(backend: Backend) -> None:
    """Adds a backend; it replaces an earlier one of the same name."""
    _BACKENDS[backend.name] = backend
    _choices.clear()


def backends() -> tuple[Backend, ...]:
    """Returns all registered backends in order of decreasing priority, with those without one last."""
    return tuple(sorted(_BACKENDS.values(), key=lambda b: math.inf if b.priority is None else -b.priority))


def set_backend(name: str, device_type: str) -> Choice:
    """Makes the backend ``name`` (or ``"auto"``) serve the op from now on.

    Returns:
        The backend that serves ``device_type``, and the reason.

    Raises:
        ValueError: if there is no such backend, or it cannot run on ``device_type``; the message has the reason and the
            alternatives.
    """
    global _requested
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(
            f"backend {name!r} is not part of this build: use auto or one of {[b.name for b in backends()]}"
        )
    previous, _requested = _requested, name
    _choices.clear()
    try:
        return active_backend(device_type)
    except Exception:
        _requested = previous
        raise


def active_backend(device_type: str) -> Choice:
    """Returns the backend that serves a device type at present.

    Raises:
        ValueError: if the requested backend cannot run there.
    """
    choice = _choices.get(device_type)
    if choice is None:
        choice = _choices[device_type] = _choose(device_type)
    return choice


def _choose(device_type: str) -> Choice:
    reasons = {b.name: b.unavailable(device_type) for b in backends()}
    able = [b for b in backends() if reasons[b.name] is None]
    if _requested != "auto":
        if reasons[_requested] is not None:
            raise ValueError(
                f"backend {_requested!r} was asked for and cannot run on {device_type}: {reasons[_requested]}; "
                f"available there: {[b.name for b in able]}"
            )
        return Choice(_BACKENDS[_requested], "asked for by name")
    passed = [f"{b.name}: {reasons[b.name]}" for b in backends() if reasons[b.name] is not None]
    passed += [f"{b.name}: only by name" for b in able if b.priority is None]
    why = "best available" + (f" (not {'; not '.join(passed)})" if passed else "")
    return Choice(next(b for b in able if b.priority is not None), why)
