# SPDX-License-Identifier: Apache-2.0
"""From conversations to the token files of supervised fine-tuning."""
