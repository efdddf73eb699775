# SPDX-License-Identifier: Apache-2.0
"""Preparation of conversations as the token files of supervised fine-tuning."""
