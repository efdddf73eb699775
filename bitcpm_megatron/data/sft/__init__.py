# SPDX-License-Identifier: Apache-2.0
"""The way from conversations to the token files of supervised fine-tuning."""
