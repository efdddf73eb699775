# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model that becomes ternary, by flags or by code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..quantization import QuantizerConfig
from ..quantization.recipe import Recipe

CacheMode = Literal["step", "none"]
"""How a layer keeps its quantized weight: until the weights change, or not at all."""
CacheChoice = Literal["auto", "resident", "packed", "step", "none"]
"""Of a training run: ``resident`` holds the quantized weights in the parameters themselves, ``packed`` in 2 bits."""

Gemm = Literal["bf16", "int8"]
"""How a layer's GEMMs are computed: as the weights are stored, or in integers."""

Estimator = Literal["identity", "clipped"]
"""What stands for the gradient of the quantizer: the straight-through estimator, or that within the levels' reach."""


@dataclass(frozen=True)
class TernarySettings:
    """How a model is quantized; see ``--ternary`` and its companions.

    Attributes:
        default: quantizer of modules whose recipe entry does not say otherwise.
        recipe: a recipe, its YAML file, or None for every linear of the decoder layers.
        row_parallel_shards: groups per whole row of row-parallel weights under ``group_size=-1``; None for the
            tensor-parallel size of the run.
        backend: that quantizes, by name; ``auto`` for the best one of the device.
        cache: ``step`` quantizes once per optimizer step and ``none`` in every forward; ``resident`` quantizes behind
            the optimizer, in the parameters, and ``auto`` is this where it is possible, else ``step``; ``packed`` keeps
            2-bit codes and scales alone.
        verify_cache: quantize again at every use of the cache, and raise where it is stale.
        activation_bits: 8 also quantizes the input of every quantized layer, per token; 16 leaves it alone.
        gemm: ``int8`` computes the forward of every quantized layer from int8 activations and ternary codes.
        gemm_backward: ``int8`` computes the input gradients so, too, from gradients in int8.
    """

    default: QuantizerConfig = field(default_factory=QuantizerConfig)
    recipe: Recipe | str | Path | None = None
    row_parallel_shards: int | None = None
    backend: str = "auto"
    cache: CacheChoice = "auto"
    verify_cache: bool = False
    activation_bits: int = 16
    gemm: Gemm = "bf16"
    gemm_backward: Gemm = "bf16"
