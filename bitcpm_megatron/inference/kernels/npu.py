# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel: ``bitcpm::ascendc_unpack`` for any number of tokens; the matrix product is the NPU's own."""

from ...ops import ascendc
from .reference import PackedKernels


def kernels() -> PackedKernels:
    """Returns the AscendC kernel.

    Raises:
        RuntimeError: if the kernel is not available; the message names what is missing.
    """
    why = ascendc.unavailable("npu")
    if why is not None:
        raise RuntimeError(f"packed weights cannot be computed with on an NPU: {why}")
    return PackedKernels("ascendc", ascendc.unpack_weight)
