# SPDX-License-Identifier: Apache-2.0
"""Measurements of training steps: layouts, variants, meters, jobs and reports."""
