# SPDX-License-Identifier: Apache-2.0
"""The architecture of a decoder of the Llama / MiniCPM4 / Granite family, as a frozen description without torch.

The three families share their layers (pre-norm RMSNorm, rotary GQA, SwiGLU, no biases) and their tensors. They differ
in four numbers, which are all 1 (or the usual ``head_dim ** -0.5``) in a Llama. With embedding E and output layer W::

    h      = embedding_multiplier * E[tokens]
    h      = h + residual_multiplier * attention(norm(h))       softmax(attention_multiplier * q k^T)
    h      = h + residual_multiplier * mlp(norm(h))
    logits = W norm(h) / logits_scaling

The names are those of Transformers' ``GraniteConfig``. MiniCPM writes the same numbers as ``scale_emb``,
``scale_depth / sqrt(layers)`` and ``hidden_size / dim_model_base``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..cli import Number, Whole

# More layers than anybody trains; code that loops over the layers of a description must come to an end.
MAX_LAYERS = 10_000
_BOUNDS: dict[str, Whole | Number] = {
    "num_layers": Whole(maximum=MAX_LAYERS),
    "hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size": Whole(),
    "max_position_embeddings": Whole(),
    "norm_epsilon rotary_base logits_scaling": Number(0, open_minimum=True),
    "embedding_multiplier residual_multiplier": Number(),
}


class ArchitectureError(ValueError):
    """The exception for a model description that is contradictory, or that this package does not know."""


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753), which divides every rotary frequency by a factor that depends on the length.

    As in Transformers' ``rope_type: longrope``, each frequency has a factor in one list up to the original length, and
    in another list beyond it.

    Attributes:
        short_factor: ``head_dim / 2`` divisors for sequences up to ``original_max_position_embeddings`` tokens.
        long_factor: ``head_dim / 2`` divisors for longer sequences.
        original_max_position_embeddings: the original length, in tokens.
        attention_factor: the multiplier of cos and sin; None for the formula of :meth:`effective_attention_factor`.
        factor: the ratio of maximal to original length in that formula; None for the ratio of the two lengths.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if not self.original_max_position_embeddings >= 2:
            raise ArchitectureError(
                f"LongRoPE's original length {self.original_max_position_embeddings}: must be 2 tokens or more"
            )
        for name in ("short_factor", "long_factor"):
            if not all(f > 0 for f in getattr(self, name)):
                raise ArchitectureError(f"LongRoPE's {name}: every value must be above 0")
        for name in ("attention_factor", "factor"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not value > 0):
                raise ArchitectureError(f"LongRoPE's {name} {value!r}: must be above 0")

    def effective_attention_factor(self, max_position_embeddings: int) -> float:
        """Returns the multiplier of cos and sin.

        If it is not given, it is ``sqrt(1 + ln(factor) / ln(original length))``, and 1 if nothing is stretched.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or max_position_embeddings / self.original_max_position_embeddings
        return math.sqrt(1 + max(0.0, math.log(factor)) / math.log(self.original_max_position_embeddings))


@dataclass(frozen=True)
class Multipliers:
    """The four numbers in which MiniCPM and Granite differ from a Llama, defined in the module's docstring.

    An attention multiplier of None stands for ``kv_channels ** -0.5``.
    """

    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture(Multipliers):
    """The shapes and constants of a model.

    Attributes:
        ffn_hidden_size: the rows of the gate projection, and of the up projection.
        num_query_groups: the number of key / value heads.
        kv_channels: the size of one head; ``heads * kv_channels`` need not be ``hidden_size``.
        vocab_size: the number of tokens, without padding.
        max_position_embeddings: the length of the longest sequence, in tokens.
        norm_epsilon: the epsilon of every RMSNorm.
        tied: whether the embedding is also the output layer.
        longrope: the LongRoPE, None for plain RoPE.

    Raises:
        ArchitectureError: if numbers are out of bounds or contradict each other; the message names them.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    tied: bool
    longrope: LongRope | None = None

    def __post_init__(self) -> None:
        for names, bound in _BOUNDS.items():
            for name in names.split():
                mistake = bound.mistake(getattr(self, name))
                if mistake is not None:
                    raise ArchitectureError(f"{name} {getattr(self, name)!r}: {mistake}")
        if self.num_attention_heads % self.num_query_groups:
            raise ArchitectureError(
                f"{self.num_query_groups} key/value heads do not divide {self.num_attention_heads} query heads"
            )
        if self.kv_channels % 2:
            raise ArchitectureError(f"a head of {self.kv_channels} channels cannot be rotated: it must be even")
        for name in ("short_factor", "long_factor"):
            if self.longrope is not None and len(getattr(self.longrope, name)) != self.kv_channels // 2:
                raise ArchitectureError(
                    f"{name} of longrope has {len(getattr(self.longrope, name))} values, a head of {self.kv_channels} "
                    f"channels needs {self.kv_channels // 2}"
                )

    @property
    def is_llama(self) -> bool:
        """Whether a plain Llama computes the same."""
        ones = (self.embedding_multiplier, self.residual_multiplier, self.logits_scaling)
        return ones == (1.0, 1.0, 1.0) and self.attention_multiplier in (None, self.kv_channels**-0.5)

    @property
    def softmax_scale(self) -> float:
        """The multiplier of ``q k^T``."""
        return self.kv_channels**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def computes_like(self, other: "Architecture") -> bool:
        """Returns whether two descriptions mean the same, up to the rounding of the multipliers in fp64."""
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "softmax_scale")
        close = all(math.isclose(getattr(self, n), getattr(other, n), rel_tol=1e-12) for n in names)
        ones: dict[str, Any] = dict.fromkeys(names[:3], 1.0)
        ours, theirs = (replace(a, attention_multiplier=None, **ones) for a in (self, other))
        return close and ours == theirs

    def parameter_count(self) -> int:
        """Counts the parameters, without padding of the vocabulary."""
        heads = self.num_attention_heads + 2 * self.num_query_groups
        attention = self.hidden_size * self.kv_channels * (heads + self.num_attention_heads)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + self.hidden_size + vocabulary


def uneven(parts: Mapping[str, int], size: int) -> str | None:
    """Returns which parts (name -> count) a tensor-parallel size does not divide, and which sizes divide all parts.

    Returns None if the size divides all parts.
    """
    wrong = [f"{count} {what}" for what, count in parts.items() if count % size]
    fitting = ", ".join(map(str, divisors(math.gcd(*parts.values()))))
    return f"{' and '.join(wrong)}; these sizes do: {fitting}" if wrong else None


def divisors(number: int) -> list[int]:
    """Returns all divisors of a positive whole number, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
