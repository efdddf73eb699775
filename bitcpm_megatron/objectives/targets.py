# SPDX-License-Identifier: Apache-2.0
"""A teacher's targets for each token: all logits, the likeliest ids with the rest as one bucket, or a few draws.

The first axes of every tensor are those of the tokens, ``[...]``, and the same as those of the student's logits:
``[s, b]`` (sequence length, micro-batch size) as in megatron-core, or ``[tokens]`` in a store. The last axis is the
vocabulary (V padded ids over TP tensor-parallel ranks), or the k ids kept of each token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch

_Index: TypeAlias = int | slice | torch.Tensor
TokenIndex: TypeAlias = _Index | tuple[_Index, ...]

_T = TypeVar("_T", bound="_OfTokens")

# The largest ln sum_K p that rounding can give: ln p in fp16 is off by 2^-12 of itself, the sum of -p ln p is below 12.
_ROUNDING = 0.01


@dataclass(frozen=True, eq=False)
class _OfTokens:
    """The base of targets: tensors that share the axes of their tokens."""

    def __getitem__(self: _T, tokens: TokenIndex) -> _T:
        """Returns the targets of some tokens, as views if possible: ``targets[start:end]``, ``targets[:, rows]``."""
        axes = tokens if isinstance(tokens, tuple) else (tokens,)
        index = (*axes, ..., slice(None))
        return self._each(lambda tensor: tensor[index])

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        """Returns the targets on another device, moved as ``torch.Tensor.to`` does."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def flatten(self: _T) -> _T:
        """Returns the targets with one axis of tokens."""
        return self._each(lambda tensor: tensor.flatten(0, -2))

    @property
    def shape(self) -> torch.Size:
        """The shape of the axes of the tokens."""
        return next(iter(self._tensors().values())).shape[:-1]

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def _each(self: _T, change: Callable[[torch.Tensor], torch.Tensor]) -> _T:
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})


@dataclass(frozen=True, eq=False)
class DenseTargets(_OfTokens):
    """All logits of a teacher that runs beside the student, in the same tensor-parallel group.

    Attributes:
        logits: bf16, fp16 or fp32 ``[..., V / TP]`` as the teacher's output layer gives them, before any temperature.
            The columns of this rank are the same ids as in the student: the teacher is built with the student's padded
            vocabulary size, and the values in the padding are not read.
    """

    logits: torch.Tensor


@dataclass(frozen=True, eq=False)
class TopKTargets(_OfTokens):
    """The likeliest ids of each token; the probability that they leave is that of all other ids together.

    Attributes:
        ids: int32 ``[..., k]``, each once per token, below the vocabulary size; k is below it, too.
        log_probabilities: ``[..., k]``, natural logarithms of the teacher's softmax over the whole vocabulary at
            ``temperature``, not renormalized over k. With fp32 the rest is exact to some 1e-7, with fp16 to ``2^-12``
            of the teacher's entropy, which is small if the rest is small.
        temperature: the temperature of the teacher's softmax.

    Raises:
        ValueError: if the shapes or dtypes are others.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor
    temperature: float

    def __post_init__(self) -> None:
        _check_pair(self.ids, "log_probabilities", self.log_probabilities, self.log_probabilities.is_floating_point())

    def malformed(self, vocab_size: int) -> torch.Tensor:
        """Marks, as bool ``[...]``, tokens with an id outside the vocabulary, or probabilities whose sum is above 1."""
        return _outside(self.ids, vocab_size) | ~(self.log_probabilities.float().logsumexp(-1) < _ROUNDING)


@dataclass(frozen=True, eq=False)
class SampledTargets(_OfTokens):
    """The counts of each id among draws from the teacher's softmax: p is estimated by ``counts / draws``.

    Sampled distillation is unbiased (arXiv 2503.16870).

    Attributes:
        ids: int32 ``[..., k]``, each once per token, below the vocabulary size; 0 where the count is 0.
        counts: uint8 ``[..., k]``, whose sum is ``draws`` for every token; 0 in unused places.
        draws: the number of draws per token.
        temperature: the temperature of the teacher's softmax.

    Raises:
        ValueError: if the shapes or dtypes are others.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    draws: int
    temperature: float

    def __post_init__(self) -> None:
        _check_pair(self.ids, "uint8 counts", self.counts, self.counts.dtype == torch.uint8)

    def malformed(self, vocab_size: int) -> torch.Tensor:
        """Marks, as bool ``[...]``, tokens with an id outside the vocabulary, or with another number of draws."""
        return _outside(self.ids, vocab_size) | (self.counts.sum(-1) != self.draws)


Targets: TypeAlias = DenseTargets | TopKTargets | SampledTargets


def _check_pair(ids: torch.Tensor, name: str, weights: torch.Tensor, fits: bool) -> None:
    if ids.dtype != torch.int32 or ids.shape != weights.shape or not fits:
        raise ValueError(
            f"targets are int32 ids and {name} of one shape, not {ids.dtype} {list(ids.shape)} and {weights.dtype} "
            f"{list(weights.shape)}"
        )


def _outside(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return ((ids < 0) | (ids >= vocab_size)).any(-1)
