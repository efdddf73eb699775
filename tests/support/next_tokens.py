# SPDX-License-Identifier: Apache-2.0
"""A model that is a table of successors of tokens, and that records what it has computed."""

from collections.abc import Mapping

import torch

from bitcpm_megatron.inference.generate import NextToken


class Follows(NextToken):
    """A model that writes after each token its successor in a table, by default 0.

    Args:
        follows: the successor of each token.
        rows: the number of logits.
        spread: whether to ignore the table: the last quarter of the tokens are equally likely, and likelier than the
            others, which are equally likely, too.

    Attributes:
        computed: the tokens of every forward, without those that were kept from earlier ones.
        interrupted: whether forwards raise KeyboardInterrupt.
        scale: the factor of the logits from the table.
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
