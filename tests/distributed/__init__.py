# SPDX-License-Identifier: Apache-2.0
"""Tests on several ranks; a package, so that processes started by its fixtures end with its last test."""
