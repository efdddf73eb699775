# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torch_npu.utils.collect_env``."""


def get_cann_version() -> str:
    """Returns a CANN version that MindSpeed, which compares it with those it supports, accepts."""
    return "8.5.0"
