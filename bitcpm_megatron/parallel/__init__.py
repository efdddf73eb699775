# SPDX-License-Identifier: Apache-2.0
"""Floor 5: ternary column / row parallel linears for megatron-core."""

from ..nn.cache import CacheEpoch, find_epoch
from ..nn.coverage import CoverageEntry, CoverageReport
from ..nn.linear import StaleCacheError, TernaryState, make_ternary, ternary_state
from ..nn.straight_through import is_shadow
from ..quantization.recipe import Recipe, RecipeError
from .apply import apply_recipe
from .linears import register_linear
from .probe import ProbeError, probe, ternary_modules, watch_use
from .telemetry import Telemetry

__all__ = [
    "CacheEpoch",
    "CoverageEntry",
    "CoverageReport",
    "ProbeError",
    "Recipe",
    "RecipeError",
    "StaleCacheError",
    "Telemetry",
    "TernaryState",
    "apply_recipe",
    "find_epoch",
    "is_shadow",
    "make_ternary",
    "probe",
    "register_linear",
    "ternary_modules",
    "ternary_state",
    "watch_use",
]
