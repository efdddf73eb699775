# SPDX-License-Identifier: Apache-2.0
"""A student that learns from a teacher: the teacher beside it, and the objective that both make up."""
