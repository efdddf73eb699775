# SPDX-License-Identifier: Apache-2.0
"""Floor 1: what training minimises."""
