# SPDX-License-Identifier: Apache-2.0
"""Plan of a packed export: the type of every weight and the size of the file, decided before anything is written.

A ternary weight has one scale per group of ``e`` elements: a whole row, a part of a row that was split over
row-parallel shards, or the group size. A type whose blocks have their own scales holds the weight exactly if the block
size divides ``e``, and with it the row. A weight that does not fit is refused by name; nothing is rounded to make it
fit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..storage.reader import ConversionError, TensorInfo
from ..tensor_map import PROJECTION
from .block_types import BF16, F16, F32, FLOATS, GGUF_TYPES, Q2_0, Q4_0, Q5_0, Q8_0, TQ1_0, TQ2_0, GgufType

AUTO = "auto"
ALIGNMENT = 32
"""Alignment in bytes: every tensor of a GGUF file begins at a multiple of it."""
IN_ORDER = (TQ2_0, Q2_0, Q4_0, BF16)
"""Types of ternary weights that clients compute fast with, the smallest first; BF16 holds every ternary weight."""
LINEAR_TYPES = tuple(kind.name for kind in (TQ2_0, TQ1_0, Q2_0, Q4_0, BF16, F16, F32))
EMBEDDING_TYPES = tuple(kind.name for kind in (F16, Q8_0, Q5_0, Q4_0, BF16, F32))
LADDER = EMBEDDING_TYPES[:4]
"""Types of embeddings from the least lossy to the smallest, which are tried in this order to reach a target ratio."""
WORD_BITS = 32
BITS = (2, 4)
"""Possible numbers of bits per code in compressed-tensors; both are exact."""

Role = Literal["ternary linears", "other linears", "embeddings", "the rest"]


@dataclass(frozen=True)
class Weight:
    """A tensor of a model that is going to be packed.

    Attributes:
        name: Hugging Face's name of the tensor.
        info: the shape and dtype of the tensor before packing.
        group: the number of elements per scale of a ternary weight; None for any other tensor.
    """

    name: str
    info: TensorInfo
    group: int | None = None

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.name.removesuffix(".weight")

    @property
    def role(self) -> Role:
        """Category of the tensor in tables."""
        if self.group is not None:
            return "ternary linears"
        if PROJECTION.fullmatch(self.name):
            return "other linears"
        return "embeddings" if len(self.info.shape) == 2 else "the rest"


@dataclass(frozen=True)
class Choice:
    """A weight, the name of the type it is stored in, and its bytes in the file's data section with alignment."""

    weight: Weight
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Plan of an export: the type in which every weight is stored.

    Attributes:
        choices: the choice for every weight, in the order in which they are written.
    """

    choices: tuple[Choice, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data section in bytes."""
        return sum(choice.nbytes for choice in self.choices)

    @property
    def ratio(self) -> float:
        """Ratio of the bytes of the whole model in BF16 to those of the data section."""
        return _ratio(self.choices)

    @property
    def linear_ratio(self) -> float:
        """Ratio of the bytes of the ternary linears in BF16 to those in the data section."""
        return _ratio([choice for choice in self.choices if choice.weight.group is not None])

    def by_kind(self) -> dict[tuple[Role, str], list[Choice]]:
        """Returns the choices by role and type."""
        found: dict[tuple[Role, str], list[Choice]] = {}
        for choice in self.choices:
            found.setdefault((choice.weight.role, choice.kind), []).append(choice)
        return found

    def table(self) -> str:
        """Returns a table for people, with a line for every role and type, and the ratios."""
        lines = [f"{'':16} {'type':16} {'tensors':>7} {'bytes':>15} {'bits per weight':>15}"]
        for (role, kind), these in self.by_kind().items():
            nbytes, count = sum(c.nbytes for c in these), sum(_numel(c) for c in these)
            lines.append(f"{role:16} {kind:16} {len(these):7} {nbytes:15,} {8 * nbytes / count:15.3f}")
        dense = 2 * sum(map(_numel, self.choices))
        lines.append(
            f"{self.nbytes:,} bytes, {self.ratio:.2f} times smaller than {dense:,} in BF16; the ternary linears alone "
            f"{self.linear_ratio:.2f} times"
        )
        return "\n".join(lines)


def _numel(choice: Choice) -> int:
    return choice.weight.info.nbytes // choice.weight.info.dtype.itemsize


def _ratio(choices: Iterable[Choice]) -> float:
    choices = list(choices)
    return 2 * sum(map(_numel, choices)) / sum(choice.nbytes for choice in choices)


def plan_gguf(weights: Sequence[Weight], linear_type: str = AUTO, embedding_type: str = F16.name) -> Plan:
    """Returns the plan of a GGUF file.

    Args:
        weights: the weights of the model, in the order of the file.
        linear_type: the type of ternary weights, one of :data:`LINEAR_TYPES`, or ``auto``, which takes for each weight
            the first type of :data:`IN_ORDER` that is exact. With F32 the other linears become F32, too; otherwise they
            keep their dtype.
        embedding_type: the type of the embedding and the output layer, one of :data:`EMBEDDING_TYPES`.

    Raises:
        ConversionError: if the requested type cannot hold a weight; the message names both, and a type that can.
    """
    choices = []
    for weight in weights:
        if weight.role == "the rest":
            kind = F32  # clients compute norms in fp32
        elif weight.role == "embeddings":
            kind = _of_embedding(weight, embedding_type)
        elif weight.group is None:
            kind = F32 if linear_type == F32.name else FLOATS[weight.info.dtype]
        else:
            kind = _of_ternary(weight, linear_type)
        rows = 1 if len(weight.info.shape) == 1 else weight.info.shape[0]
        nbytes = rows * kind.row_bytes(weight.info.shape[-1])
        choices.append(Choice(weight, kind.name, -(-nbytes // ALIGNMENT) * ALIGNMENT))
    return Plan(tuple(choices))


def plan_compressed_tensors(weights: Sequence[Weight], bits: str = AUTO) -> Plan:
    """Returns the plan of a compressed-tensors export, in which all weights that are not ternary keep their dtype.

    Args:
        weights: the weights of the model.
        bits: the number of bits of all codes, ``"2"`` or ``"4"``, or ``auto`` for the smallest that fits all groups.

    Raises:
        ConversionError: if a group is not a multiple of the codes that a word of 32 bits holds.
    """
    mistakes: dict[int, str] = {}
    offered = BITS if bits == AUTO else (int(bits),)
    for count in offered:
        choices = []
        per_word = WORD_BITS // count
        for weight in weights:
            rows, columns = weight.info.shape[0], weight.info.shape[-1]
            nbytes, kind = weight.info.nbytes, str(weight.info.dtype).removeprefix("torch.")
            if weight.group is not None:
                if weight.group % per_word or columns % weight.group:
                    mistakes[count] = (
                        f"{weight.module}: groups of {weight.group} are no multiple of the {per_word} codes that a "
                        f"word of 32 bits holds at {count} bits"
                    )
                    break
                scales = rows * columns // weight.group * weight.info.dtype.itemsize
                nbytes, kind = rows * columns * count // 8 + scales + 16, f"pack-quantized {count}"
            choices.append(Choice(weight, kind, nbytes))
        else:
            return Plan(tuple(choices))
    raise ConversionError(f"{mistakes[offered[0]]}: --format gguf can hold it exactly, as BF16 if in nothing smaller")


def reach(target: float, plan_of: Callable[[str], Plan], types: Sequence[str]) -> tuple[str, Plan]:
    """Returns the first type whose plan reaches a ratio, and this plan.

    Args:
        target: the required ratio of the bytes in BF16 to those of the plan.
        plan_of: a function that returns the plan for a type of the embeddings.
        types: the types, from the least lossy to the smallest.

    Raises:
        ConversionError: if no type reaches the ratio; the message lists the ratios that can be reached.
    """
    plans: dict[str, Plan] = {}
    refused: ConversionError | None = None
    for name in types:
        try:
            plans[name] = plan_of(name)
        except ConversionError as error:
            if not plans:
                raise
            refused = error
            continue
        if plans[name].ratio >= target:
            return name, plans[name]
    found = ", ".join(f"{plan.ratio:.2f} ({name})" for name, plan in plans.items())
    more = "" if refused is None else f"; {refused}"
    raise ConversionError(
        f"--target-ratio {target:g} cannot be reached: the ratios by type of the embeddings are {found}{more}"
    )


def _of_ternary(weight: Weight, linear_type: str) -> GgufType:
    exact = next(kind for kind in IN_ORDER if _mistake(weight, kind) is None)
    if linear_type == AUTO:
        return exact
    kind = GGUF_TYPES[linear_type]
    mistake = _mistake(weight, kind)
    if mistake is not None:
        raise ConversionError(
            f"--linear-type {kind.name}: {weight.module} {mistake}; the nearest exact type is {exact.name}: give "
            f"--linear-type {exact.name}, or leave it out, which chooses for every weight"
        )
    return kind


def _mistake(weight: Weight, kind: GgufType) -> str | None:
    """Returns the reason why blocks of a type cannot hold a ternary weight exactly, or None if they can."""
    assert weight.group is not None
    if weight.group % kind.block:
        return (
            f"has a scale for every {weight.group} elements of its rows of {weight.info.shape[1]}, and {kind.name} one "
            f"for every block of {kind.block}"
        )
    return None


def _of_embedding(weight: Weight, embedding_type: str) -> GgufType:
    kind, columns = GGUF_TYPES[embedding_type], weight.info.shape[1]
    if columns % kind.block:
        raise ConversionError(
            f"--embedding-type {kind.name}: {weight.module} has rows of {columns}, which blocks of {kind.block} do not "
            "fill: F16 has no blocks"
        )
    return kind
