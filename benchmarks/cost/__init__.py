# SPDX-License-Identifier: Apache-2.0
"""Cost model of a training step: its predictions, and their comparison with measurements."""
