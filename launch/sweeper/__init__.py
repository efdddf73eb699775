# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the runs of a sweep file, and the table and the picture of what they have logged."""
