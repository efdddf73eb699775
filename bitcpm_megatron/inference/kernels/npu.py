# SPDX-License-Identifier: Apache-2.0
"""``bitcpm::ascendc_unpack`` for every number of tokens: the matrix product is the NPU's own."""

from ...ops import ascendc
from .reference import PackedKernels


def kernels() -> PackedKernels:
    """The AscendC kernel.

    Raises:
        RuntimeError: it is not there, with what is missing.
    """
    why = ascendc.unavailable("npu")
    if why is not None:
        raise RuntimeError(f"packed weights cannot be computed with on an NPU: {why}")
    return PackedKernels("ascendc", ascendc.unpack_weight)
