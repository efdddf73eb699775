# SPDX-License-Identifier: Apache-2.0
"""Scores by item, what they say of two models together, and the table of it: on numpy alone, without the harness."""
