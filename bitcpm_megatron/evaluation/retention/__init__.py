# SPDX-License-Identifier: Apache-2.0
"""Retention: scores by item, the comparison of two models, and its report; computed with numpy, without the harness."""
