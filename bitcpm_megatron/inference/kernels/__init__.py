# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""Kernels for products with ternary weights that stay packed, by device.

===========  ========================================================================================
``cpu``      a C kernel for few tokens, and one that unpacks rows
``triton``   a Triton kernel for few tokens, and the kernel that unpacks weights in training
``ascendc``  the kernel that unpacks weights in training
``torch``    unpacks in torch: for a CPU without a C compiler and a GPU without Triton, many times slower
===========  ========================================================================================
"""

import functools

from . import cpu, cuda, npu
from .reference import MOST_TOKENS, PackedKernels

_KERNELS = {"cpu": cpu.kernels, "cuda": cuda.kernels, "npu": npu.kernels}


@functools.cache
def kernels_for(device_type: str) -> PackedKernels:
    """Returns the kernels of a device type; the first call compiles or loads them.

    Raises:
        RuntimeError: if there are none for the device type; the message names what is missing.
    """
    if device_type not in _KERNELS:
        raise RuntimeError(f"packed weights are computed with on {', '.join(_KERNELS)}, not on {device_type}")
    return _KERNELS[device_type]()
