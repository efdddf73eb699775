# SPDX-License-Identifier: Apache-2.0
"""Tensors in files, read block by block and without running code, and written whole or not at all."""
