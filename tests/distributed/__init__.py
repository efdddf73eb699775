# SPDX-License-Identifier: Apache-2.0
"""Tests on several ranks. A package, so that what its fixtures start ends with its last test."""
