# SPDX-License-Identifier: Apache-2.0
"""Memory that is freed goes back to the system."""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3


def return_freed_memory() -> None:
    """Makes the C library give freed blocks of 1 MB and more back at once; for the start of a command.

    glibc otherwise learns from the first freed block to keep blocks of up to 32 MB on its heap, where small objects
    come to lie in the holes: a conversion that holds one piece of 20 MB at a time grows by about 20 MB per piece. Does
    nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
