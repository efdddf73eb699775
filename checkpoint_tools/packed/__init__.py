# SPDX-License-Identifier: Apache-2.0
"""Packed exports: ternary weights in the few bits that they need, in formats that stock clients read."""
