# SPDX-License-Identifier: Apache-2.0
"""Floor 6: text generation with trained models."""
