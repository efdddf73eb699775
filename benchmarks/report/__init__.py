# SPDX-License-Identifier: Apache-2.0
"""Reports of measured numbers: tables, confidence intervals and pictures."""
