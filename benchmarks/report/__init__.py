# SPDX-License-Identifier: Apache-2.0
"""Measured numbers as tables, intervals and pictures."""
