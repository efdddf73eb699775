# SPDX-License-Identifier: Apache-2.0
"""Tests of commands that are killed, asked to stop, or run out of disk space at random moments."""
