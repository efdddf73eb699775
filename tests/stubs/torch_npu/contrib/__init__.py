# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torch_npu.contrib``."""
