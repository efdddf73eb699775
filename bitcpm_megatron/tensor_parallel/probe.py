# SPDX-License-Identifier: Apache-2.0
"""The start-up probe: proves for every quantized layer that its output is ``x Wq^T``.

A host may replace a linear's class, its forward or the functions below it, and a quantizer that is bypassed trains in
full precision with a perfectly good-looking loss. So each layer is run, as it stands, on one-hot inputs: its outputs
are then columns of the weight that the GEMM really used, exact in every dtype, and compared bit for bit. A norm inside
the layer is left out meanwhile.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..quantization import quantize_dequantize
from .linear import TernaryState, ternary_state
from .linears import parallel_kind, registered_linear, tensor_parallel_group

_POSITIONS = 16


class ProbeError(RuntimeError):
    """A layer that should be ternary computes with another weight."""


def ternary_modules(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[tuple[TernaryState, torch.nn.Module]]:
    """The quantized modules of a model or of its chunks, in order."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    return [(s, m) for chunk in chunks for m in chunk.modules() if (s := ternary_state(m)) is not None]


@torch.no_grad()
def probe(model: torch.nn.Module | Sequence[torch.nn.Module]) -> int:
    """Runs every quantized layer on one-hot inputs and compares with an independent quantization of its weight.

    Layers communicate as in training, so every rank of a tensor-parallel group must call this at once.

    Args:
        model: a model, or all chunks of this rank, after :func:`apply_recipe`.

    Returns:
        The number of layers proved.

    Raises:
        ProbeError: names every layer whose output is not ``x Wq^T``, with the largest difference.
    """
    wrong = []
    modules = ternary_modules(model)
    for state, module in modules:
        found, expected = _columns(state, module)
        if not torch.equal(found, expected):
            difference = (found.float() - expected.float()).abs().max().item()
            wrong.append(f"{state.name} ({type(module).__name__}): largest difference {difference:g}")
    if wrong:
        raise ProbeError(
            "these layers do not compute x Wq^T, something bypasses the quantizer:\n  " + "\n  ".join(wrong)
        )
    return len(modules)


def _columns(state: TernaryState, module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the weight as the layer's forward used them, and as they should be; both ``[positions, out]``."""
    weight = module.weight
    group = tensor_parallel_group(module)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    row_parallel = parallel_kind(module) == "row"
    local_in = weight.shape[1]
    whole_in = local_in * size if row_parallel else local_in
    positions = torch.linspace(0, whole_in - 1, _POSITIONS * size, device=weight.device).long()
    one_hot = torch.nn.functional.one_hot(positions, whole_in).to(weight.dtype).unsqueeze(1)
    local = positions
    if row_parallel:
        one_hot = one_hot[..., rank * local_in : (rank + 1) * local_in]
        local = positions - rank * local_in
    # Experts leave gathering, reducing and scattering to the token dispatcher.
    communicates = size > 1 and not getattr(module, "explicit_expert_comm", False)
    sequence_parallel = getattr(module, "sequence_parallel", False) and communicates
    if sequence_parallel and not row_parallel:
        one_hot = one_hot.chunk(size)[rank]

    with _without_norm(module):
        output = module(one_hot.contiguous())
    found, bias = output if isinstance(output, tuple) else (output, None)
    found = found.squeeze(1)

    _, scales = state.quantize(weight)
    quantized, _ = quantize_dequantize(weight, state.config.group_size, state.config.eps, scales)
    inside = (local >= 0) & (local < local_in)
    expected = quantized.t()[local.clamp(0, local_in - 1)] * inside.unsqueeze(1)
    if row_parallel and communicates:
        torch.distributed.all_reduce(expected, group=group)
        if sequence_parallel:
            expected = expected.chunk(size)[rank]
    if bias is None and getattr(module, "bias", None) is not None:
        expected = expected + module.bias
    return found, expected.to(found.dtype)


@contextlib.contextmanager
def _without_norm(module: torch.nn.Module) -> Iterator[None]:
    """Lets the input of a layer through to its GEMM as it is."""
    registered = registered_linear(module)
    names = () if registered is None else registered.norm_methods
    for name in names:
        module.__dict__[name] = _unchanged
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
