# SPDX-License-Identifier: Apache-2.0
"""Storage of tensors: files are read block by block without running code, and written completely or not at all."""
