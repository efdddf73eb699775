# SPDX-License-Identifier: Apache-2.0
"""Settings of a model that becomes ternary, from flags or from code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..quantization import QuantizerConfig
from ..quantization.recipe import Recipe

CacheMode = Literal["step", "none"]
"""How long a layer keeps its quantized weight: ``step`` until the weights change, ``none`` not at all."""
CacheChoice = Literal["auto", "resident", "packed", "step", "none"]
"""The cache of a training run: a :data:`CacheMode`, or another place for the quantized weights.

``resident`` keeps them in the parameters themselves, and ``packed`` in 2 bits; ``auto`` is ``resident`` if possible,
else ``step``.
"""

Gemm = Literal["bf16", "int8"]
"""How a layer's GEMMs are computed: ``bf16`` as the weights are stored, ``int8`` in integers."""

Estimator = Literal["identity", "clipped"]
"""The gradient of the quantizer: ``identity`` is the straight-through estimator; ``clipped`` limits it to the levels.

``clipped`` passes the gradient of a weight only within half a step beyond the outermost levels.
"""


@dataclass(frozen=True)
class TernarySettings:
    """Settings of the quantization of a model; they correspond to ``--ternary`` and the flags that go with it.

    Attributes:
        default: the quantizer of modules whose recipe entry does not say otherwise.
        recipe: a recipe, its YAML file, or None for every linear of the decoder layers.
        row_parallel_shards: the number of groups per whole row of row-parallel weights under ``group_size=-1``; None
            for the tensor-parallel size of the run.
        backend: the name of the backend that quantizes; ``auto`` for the best one of the device.
        cache: ``step`` quantizes once per optimizer step and ``none`` in every forward; ``resident`` quantizes in the
            parameters, after the optimizer's update, and ``auto`` is ``resident`` if possible, else ``step``;
            ``packed`` keeps only 2-bit codes and scales.
        verify_cache: whether to quantize again at every use of the cache, and raise if it is stale.
        activation_bits: 8 also quantizes the input of every quantized layer, per token; 16 leaves it alone.
        gemm: ``int8`` computes the forward of every quantized layer from int8 activations and ternary codes.
        gemm_backward: ``int8`` also computes the input gradients as int8 GEMMs, from gradients in int8.
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
