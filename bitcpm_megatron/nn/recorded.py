# SPDX-License-Identifier: Apache-2.0
"""Between a model and its quantizer record: what a recipe did goes in, the same recipe comes out."""

import glob

from ..quantization import QuantizerConfig
from ..quantization.recipe import Matcher, Recipe
from ..quantization.record import QuantizerRecord
from .coverage import CoverageReport


def record_of(
    report: CoverageReport, default: QuantizerConfig, latent_dtype: str, activation_bits: int = 16
) -> QuantizerRecord:
    """The record of a model that a recipe was applied to."""
    return QuantizerRecord(
        state="latent",
        space=default.space,
        eps=default.eps,
        latent_dtype=latent_dtype,
        row_parallel_shards=report.row_parallel_shards,
        activation_bits=activation_bits,
        modules=report.modules(default),
    )


def recipe_of(record: QuantizerRecord) -> Recipe:
    """A recipe that quantizes exactly the recorded modules exactly so, at any tensor-parallel size that fits."""
    return Recipe(tuple(Matcher(path, glob.escape(path), record.config_of(path)) for path in record.modules))
