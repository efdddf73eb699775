# SPDX-License-Identifier: Apache-2.0
"""``torch_npu.utils.collect_env`` of the stand-in."""


def get_cann_version() -> str:
    """As if CANN were installed: MindSpeed compares it with the versions it supports."""
    return "8.5.0"
