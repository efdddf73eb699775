# SPDX-License-Identifier: Apache-2.0
"""Distillation: a teacher that runs beside its student or has written targets before, and the student's objective."""
