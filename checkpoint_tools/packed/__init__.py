# SPDX-License-Identifier: Apache-2.0
"""Packed exports: ternary weights stored in a few bits each, in formats that stock clients read."""
