# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels; torch's operations if Triton cannot run."""

import torch

from ...ops import triton as backend
from . import reference
from .reference import MOST_TOKENS, PackedKernels


def kernels() -> PackedKernels:
    """Returns the Triton kernels, or torch's operations and a line in the log if Triton cannot run."""
    why = backend.unavailable("cuda")
    if why is not None:
        return reference.fallback("cuda", why, "pip install triton, and leave TRITON_INTERPRET unset")
    return triton_kernels()


def triton_kernels() -> PackedKernels:
    """Returns the Triton kernels, interpreted or not."""
    from ...ops.triton.launch import unpack_weight

    return PackedKernels("triton", unpack_weight, multiply)


def multiply(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Computes x W^T of at most 32 tokens, as ``multiply`` of :class:`~.reference.PackedKernels` does."""
    from .packed_product import launch

    if not 0 < len(x) <= MOST_TOKENS:
        raise ValueError(f"{len(x)} tokens: the kernel multiplies from 1 to {MOST_TOKENS}")
    return launch(x, packed, scales)
