# SPDX-License-Identifier: Apache-2.0
"""A short comparison of a backend with the reference, for the report of ``python -m bitcpm_megatron``."""

from collections.abc import Iterator

import torch

from ..quantization import WEIGHT_DTYPES, QuantizerConfig, quantize_dequantize
from .registry import Backend


def self_test(backend: Backend, device: torch.device | str) -> str | None:
    """Runs a backend on small weights of every dtype, in groups and in rows, and compares it with the reference.

    Its own scale may differ from the reference's by one bf16 step, because a backend may sum in another order. Under
    the scale that it returns, and under a given one, the weight must equal the reference's bit for bit.

    Args:
        backend: a backend that is available on the device.
        device: the device to test on.

    Returns:
        None, or one line that says what is wrong.
    """
    for weight, group in _weights():
        ours, config = weight.to(device), QuantizerConfig(group_size=group)
        what = f"{weight.dtype} {tuple(weight.shape)}, group size {group}"
        try:
            quantized, scales = backend.kernel(ours, config, None)
            given = scales * 2
            doubled, returned = backend.kernel(ours, config, given)
        except Exception as error:  # whatever a device, a driver or a compiler raises belongs in the report
            return f"{what}: {type(error).__name__}: {error}"
        expected_scales = quantize_dequantize(weight, config)[1]
        if scales.dtype != torch.bfloat16 or scales.shape != expected_scales.shape:
            return f"{what}: scales of shape {tuple(scales.shape)}, {scales.dtype}"
        steps = (scales.cpu().view(torch.int16).int() - expected_scales.view(torch.int16).int()).abs().max().item()
        if steps > 1:
            return f"{what}: a scale is {steps} bf16 steps beside the reference's"
        for name, found, under in (("its own scale", quantized, scales), ("a given scale", doubled, given)):
            expected = quantize_dequantize(weight, config, under.cpu())[0]
            wrong = _different(found.cpu(), expected)
            if wrong:
                return f"{what}, {name}: {wrong} of {weight.numel()} weights differ from the reference"
        if not torch.equal(returned, given):
            return f"{what}: does not return the scale that was given"
    return _together(backend, device)


def _together(backend: Backend, device: torch.device | str) -> str | None:
    """Compares the weights of each dtype, quantized in place together, with the results for each weight alone."""
    for dtype in WEIGHT_DTYPES:
        ours = [(weight.to(device), group) for weight, group in _weights() if weight.dtype == dtype]
        alone = [backend.kernel(weight, QuantizerConfig(group_size=group), None) for weight, group in ours]
        weights, groups = [weight for weight, _ in ours], [group for _, group in ours]
        scales = [torch.zeros_like(own) for _, own in alone]
        try:
            backend.together(weights, weights, scales, groups, QuantizerConfig())
        except Exception as error:  # any error belongs in the report
            return f"{len(weights)} weights together, {dtype}: {type(error).__name__}: {error}"
        for found in zip(weights, scales, strict=True):
            wrong = [_different(mine.cpu(), other.cpu()) for mine, other in zip(found, alone.pop(0), strict=True)]
            if any(wrong):
                return (
                    f"{len(weights)} weights together, {dtype}: {wrong[0]} values and {wrong[1]} scales of shape "
                    f"{tuple(found[0].shape)} differ from those of one alone"
                )
    return None


def _weights() -> Iterator[tuple[torch.Tensor, int]]:
    """Yields weights ``[out, in]`` and group sizes: tails, signed zeros, a zero group, very different magnitudes."""
    g = torch.Generator().manual_seed(0)
    for rows, columns, group in ((33, 256, 32), (4, 384, 128), (9, 1000, -1), (2, 4096, -1)):
        weight = torch.randn(rows, columns, generator=g) * 10 ** torch.empty(rows, 1).uniform_(-3.0, 3.0, generator=g)
        weight[:, 3::17] *= 0.0
        weight[-1] = 0.0
        for dtype in WEIGHT_DTYPES:
            yield weight.to(dtype), group


def _different(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Returns how many values differ in a bit; all of them if shape or dtype differ."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return expected.numel()
    return int(((found != expected) | (torch.signbit(found) != torch.signbit(expected))).sum())
