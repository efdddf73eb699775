# SPDX-License-Identifier: Apache-2.0
"""What ``demo_chat.py`` trains on and asks for: generated dialogues, and a tokenizer for them."""
