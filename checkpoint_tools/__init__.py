# SPDX-License-Identifier: Apache-2.0
"""Tools that move checkpoints: to and from Hugging Face, latent to fused, and what is in them."""
