# SPDX-License-Identifier: Apache-2.0
"""Floor 4: the ternary layer on torch alone: the wrapped forward, its cache, and the straight-through estimator."""
