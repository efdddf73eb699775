# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory: its config, weights, remote code and what else lies in it."""
