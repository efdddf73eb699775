# SPDX-License-Identifier: Apache-2.0
"""A model that is a table of what follows what, and remembers what it was made to compute."""

from collections.abc import Mapping

import torch

from bitcpm_megatron.inference.generate import NextToken


class Follows(NextToken):
    """Writes behind each token the one that follows it, by default 0.

    Args:
        follows: the table.
        rows: of the logits.
        spread: whether in its place all tokens are as likely, but those of the last quarter, which are likelier.

    Attributes:
        computed: the tokens of every forward, without those that were kept.
        interrupted: whether forwards are interrupted.
        scale: of the logits.
    """

    def __init__(
        self, follows: Mapping[int, int], rows: int, spread: bool = False, original: int | None = None
    ) -> None:
        super().__init__(original)
        self.follows, self.rows, self.spread = follows, rows, spread
        self.computed: list[list[int]] = []
        self.interrupted, self.scale = False, 1.0

    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        if self.interrupted:
            raise KeyboardInterrupt
        self.computed.append(tokens[kept:])
        if self.spread:
            return (torch.arange(self.rows) >= self.rows * 3 // 4).float()
        logits = torch.zeros(self.rows)
        logits[self.follows.get(tokens[-1], 0)] = 1
        return logits * self.scale
