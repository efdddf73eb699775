# SPDX-License-Identifier: Apache-2.0
"""The model of cost: what a step should take, and how that compares with what was measured."""
