# SPDX-License-Identifier: Apache-2.0
"""Backends of the fused op: who they are, which one runs, and why."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..quantization import QuantizerConfig

Kernel = Callable[[torch.Tensor, QuantizerConfig, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""``(weight, config, scales or None) -> (quantized, scales)``, as
:func:`bitcpm_megatron.quantization.quantize_dequantize`."""
GroupedKernel = Callable[
    [Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[int], QuantizerConfig], int
]
"""``(weights, quantized, scales, group_sizes, config) -> launches``, see :meth:`Backend.together`."""


@dataclass(frozen=True)
class Backend:
    """One implementation of ``bitcpm::fake_quantize``.

    Attributes:
        name: what users type after ``--ternary-backend``.
        kernel: the implementation.
        unavailable: returns why it cannot run on a device type (``"cpu"``, ``"cuda"``, ``"npu"``), or None if it can.
        priority: ``auto`` takes the available backend with the highest one; None for a backend that only runs when it
            is asked for by name.
        spaces: the quantization spaces that it knows.
        any_scale: whether it makes scales of every statistic and multiplier; else of the absmean alone, times 1.
        grouped: quantizes many weights in few launches; None: they are quantized one by one.
    """

    name: str
    kernel: Kernel
    unavailable: Callable[[str], str | None]
    priority: int | None = 0
    spaces: tuple[str, ...] = ("ternary",)
    any_scale: bool = False
    grouped: GroupedKernel | None = None

    def knows(self, config: QuantizerConfig) -> bool:
        """Whether it can quantize so."""
        return config.space in self.spaces and (self.any_scale or config.of_absmean)

    def check(self, config: QuantizerConfig, device_type: str) -> None:
        """Refuses a quantizer that it does not know.

        Raises:
            ValueError: naming space or scale, and the backends of the device type that know them.
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
            weights: latent weights ``[out, in]`` of one dtype on one device.
            quantized: like them and contiguous, written; each may be the weight itself.
            scales: bf16 ``[out, groups]`` of each, contiguous, written.
            group_sizes: elements per scale of each, -1 for the row.
            config: the quantizer of all of them, but for its group size.

        Returns:
            How often the backend's kernels were launched.
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
    """Adds a backend; a later one of the same name replaces the earlier."""
    _BACKENDS[backend.name] = backend
    _choices.clear()


def backends() -> tuple[Backend, ...]:
    """All registered backends, by falling priority, those without one last."""
    return tuple(sorted(_BACKENDS.values(), key=lambda b: math.inf if b.priority is None else -b.priority))


def set_backend(name: str, device_type: str) -> Choice:
    """Makes ``name`` (or ``"auto"``) serve the op from now on.

    Raises:
        ValueError: no such backend, or it cannot run on ``device_type``, with the reason and the alternatives.
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
    """The backend that serves a device type now.

    Raises:
        ValueError: the requested backend cannot run there.
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
