# SPDX-License-Identifier: Apache-2.0
"""Strings of every kind, for comparisons of tokenizers."""

import random

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
# Ordinary letters, spaces of all kinds, CJK, emoji with joiners and modifiers, combining marks and rare scripts.
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABC xyz 0123456789 .,;:!?()[]{}<>|_-+=/\\\"'",
    " \t\n\r\u00a0\u2003\u200b",
    "\u4f60\u597d\u4e16\u754c\u65e5\u672c\u8a9e\u3053\u3093\u306b\u3061\u306f\ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f44d\U0001f3fd\u200d\U0001f469\U0001f4bb\u2764\ufe0f",
    "e\u0301a\u0308\u0915\u094d\u0937\u0639\u0631\u0628\u064a\U00010348\ufffd",
)


def strings(count: int) -> list[str]:
    """Returns ``count`` pseudo-random strings, always the same."""
    chosen = random.Random(0)
    parts = [*SPECIAL, "<think>", "The quick", " fox", "\n\n"]
    made = []
    for _ in range(count):
        words = []
        for _ in range(chosen.randint(1, 8)):
            letters = chosen.choices(chosen.choice(ALPHABETS), k=chosen.randint(1, 6))
            words.append(chosen.choice(parts) if chosen.random() < 0.2 else "".join(letters))
        made.append("".join(words))
    return made
