# SPDX-License-Identifier: Apache-2.0
"""Training data and questions of ``demo_chat.py``: generated dialogues, and a tokenizer for them."""
