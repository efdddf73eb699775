# SPDX-License-Identifier: Apache-2.0
"""``torch_npu.contrib`` of the stand-in."""
