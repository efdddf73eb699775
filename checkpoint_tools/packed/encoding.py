# SPDX-License-Identifier: Apache-2.0
"""Encoding of rows of weights as bytes of a GGUF type: exact except for embeddings, whose loss is measured."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from ..storage.reader import ConversionError, is_finite
from .block_types import FLOATS, GGUF_TYPES, pack_blocks, split_ternary
from .planner import Choice

_DTYPES = {kind.name: dtype for dtype, kind in FLOATS.items()}
# Elements of a piece that is quantized and measured at once; several fp32 copies of it exist at a time.
_ELEMENTS = 1 << 21


@dataclass
class Loss:
    """Difference between stored values and the model's values.

    Attributes:
        largest: the largest absolute difference.
        squares: the sum of the squared differences, in float64.
        power: the sum of the model's squared values, in float64.
    """

    largest: float = 0.0
    squares: float = 0.0
    power: float = 0.0

    def add(self, values: torch.Tensor, stored: torch.Tensor) -> None:
        """Adds some values of the model, and the values that a reader decodes from their bytes."""
        values, stored = values.double(), stored.double()
        difference = (stored - values).abs()
        self.largest = max(self.largest, float(difference.amax()))
        self.squares += float(difference.square().sum())
        self.power += float(values.square().sum())

    @property
    def relative(self) -> float:
        """Root mean square of the differences, relative to the root mean square of the model's values."""
        return math.sqrt(self.squares / self.power) if self.power else 0.0


@dataclass
class Encoder:
    """Encoder of weights that measures the loss of embeddings.

    Attributes:
        losses: the losses of the embeddings encoded so far, by GGUF type.
    """

    losses: dict[str, Loss] = field(default_factory=dict)

    def encode(self, choice: Choice, rows: torch.Tensor) -> list[np.ndarray]:
        """Returns the bytes of rows ``[rows, in]`` of a weight, or of a vector ``[in]``, as pieces of uint8.

        Raises:
            ConversionError: if the chosen type cannot hold the values.
        """
        weight, kind = choice.weight, GGUF_TYPES[choice.kind]
        if weight.group is not None and kind.pack is not None:
            codes, scales = split_ternary(weight.name, rows, weight.group)
            return [pack_blocks(weight.name, kind, codes, scales).numpy()]
        if weight.role != "embeddings":
            return [self._cast(choice, rows)]
        pieces = []
        loss = self.losses.setdefault(kind.name, Loss())
        for piece in rows.split(max(1, _ELEMENTS // rows.shape[1])):
            if kind.name in _DTYPES:
                stored = piece.to(_DTYPES[kind.name])
                pieces.append(_bytes(stored))
            else:
                quantized, stored = _quantize(kind.number, piece)
                pieces.append(quantized)
            if not is_finite(stored):
                raise ConversionError(
                    f"{weight.module} holds values that {kind.name} cannot: give another --embedding-type, such as BF16"
                )
            loss.add(piece, stored)
        return pieces

    def _cast(self, choice: Choice, rows: torch.Tensor) -> np.ndarray:
        stored = rows.to(_DTYPES[choice.kind])
        if not torch.equal(stored.to(rows.dtype), rows):
            raise ConversionError(
                f"{choice.weight.module}: {choice.kind} cannot hold its values exactly, F32 can: give --linear-type F32"
            )
        return _bytes(stored)


def _quantize(number: int, values: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Returns values encoded in a lossy type by the gguf package, and the values that it decodes from these bytes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType(number)
    quantized = quantize(values.float().numpy(), kind)
    return quantized, torch.from_numpy(dequantize(quantized, kind))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()
