# SPDX-License-Identifier: Apache-2.0
"""Megatron checkpoints of every format and parallel layout, read and written as one whole model."""
