# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""Floor 5: ternary column- and row-parallel linears for megatron-core."""

from ..nn.cache import CacheEpoch, find_epoch
from ..nn.coverage import CoverageEntry, CoverageReport
from ..nn.linear import StaleCacheError, TernaryState, make_ternary, ternary_state
from ..nn.straight_through import is_shadow
from ..quantization.recipe import Recipe, RecipeError
from .apply import apply_recipe
from .linears import register_linear
from .probe import ProbeError, probe, ternary_modules, watch_use
from .telemetry import Telemetry
