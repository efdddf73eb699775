# SPDX-License-Identifier: Apache-2.0
"""Floor 6: what a trained model says."""
