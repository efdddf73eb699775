# SPDX-License-Identifier: Apache-2.0
"""Which type holds which weight exactly, and how large the file becomes: decided before anything is written.

A ternary weight has one scale per group of ``e`` elements: all of its row, a part of a row that was split over
row-parallel shards, or the group size. A type whose blocks have scales of their own holds it exactly where the block
divides ``e`` and with it the row. What does not fit is refused by name; nothing is rounded to make it fit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..storage.reader import ConversionError, TensorInfo
from ..tensor_map import PROJECTION
from .block_types import BF16, F16, F32, FLOATS, GGUF_TYPES, Q2_0, Q4_0, Q5_0, Q8_0, TQ1_0, TQ2_0, GgufType

AUTO = "auto"
ALIGNMENT = 32
"""Bytes; every tensor of a GGUF file begins at a multiple."""
IN_ORDER = (TQ2_0, Q2_0, Q4_0, BF16)
"""Types of ternary weights, the smaller first that clients compute fast with; BF16 holds every one."""
LINEAR_TYPES = tuple(kind.name for kind in (TQ2_0, TQ1_0, Q2_0, Q4_0, BF16, F16, F32))
EMBEDDING_TYPES = tuple(kind.name for kind in (F16, Q8_0, Q5_0, Q4_0, BF16, F32))
LADDER = EMBEDDING_TYPES[:4]
"""Types of embeddings from the least lossy to the smallest, for a ratio that has to be reached."""
WORD_BITS = 32
BITS = (2, 4)
"""Per code of compressed-tensors; both are exact."""

Role = Literal["ternary linears", "other linears", "embeddings", "the rest"]


@dataclass(frozen=True)
class Weight:
    """A tensor of a model that is going to be packed.

    Attributes:
        name: Hugging Face's.
        info: its shape and dtype, unpacked.
        group: elements per scale of a ternary weight; None for any other.
    """

    name: str
    info: TensorInfo
    group: int | None = None

    @property
    def module(self) -> str:
        """Path of the module that holds it."""
        return self.name.removesuffix(".weight")

    @property
    def role(self) -> Role:
        """What it is counted with."""
        if self.group is not None:
            return "ternary linears"
        if PROJECTION.fullmatch(self.name):
            return "other linears"
        return "embeddings" if len(self.info.shape) == 2 else "the rest"


@dataclass(frozen=True)
class Choice:
    """A weight, what it becomes, and the bytes that this takes in the file's data section, alignment included."""

    weight: Weight
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What every weight becomes.

    Attributes:
        choices: in the order in which they are written.
    """

    choices: tuple[Choice, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data section."""
        return sum(choice.nbytes for choice in self.choices)

    @property
    def ratio(self) -> float:
        """Bytes of the whole model in BF16 to those of the data section."""
        return _ratio(self.choices)

    @property
    def linear_ratio(self) -> float:
        """The same of the ternary linears alone."""
        return _ratio([choice for choice in self.choices if choice.weight.group is not None])

    def by_kind(self) -> dict[tuple[Role, str], list[Choice]]:
        """The choices by what they are counted with and become."""
        found: dict[tuple[Role, str], list[Choice]] = {}
        for choice in self.choices:
            found.setdefault((choice.weight.role, choice.kind), []).append(choice)
        return found

    def table(self) -> str:
        """For people: a line for every kind of tensor and type, and the ratios."""
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
    """The plan of a GGUF file.

    Args:
        weights: of the model, in the order of the file.
        linear_type: of ternary weights, one of :data:`LINEAR_TYPES`, or ``auto`` for the first type of
            :data:`IN_ORDER` that is exact, for each by itself. With F32 the other linears become F32, too; else they
            keep their dtype.
        embedding_type: of the embedding and the output layer, one of :data:`EMBEDDING_TYPES`.

    Raises:
        ConversionError: the type that was asked for does not hold a weight, naming both and the nearest that does.
    """
    choices = []
    for weight in weights:
        if weight.role == "the rest":
            kind = F32  # clients compute norms in it
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
    """The plan of a compressed-tensors export: ``pack-quantized`` with 2 or 4 bits, everything else in its own dtype.

    Args:
        weights: of the model.
        bits: of all codes, ``"2"`` or ``"4"``, or ``auto`` for the first that is exact for all of them.

    Raises:
        ConversionError: a group does not end with a word of 32 bits.
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
    """The first of some types, the least lossy one, whose plan is as many times smaller than BF16 as is asked for.

    Raises:
        ConversionError: none is, naming what can be reached.
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
    """Why blocks of a type do not hold a ternary weight exactly, or None."""
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
