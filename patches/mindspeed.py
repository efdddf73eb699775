# SPDX-License-Identifier: Apache-2.0
"""Integration into MindSpeed and MindSpeed-LLM; the only module that knows ``mindspeed``.

Both apply the features of a list when their adaptor is imported. Our feature joins the list before that, at its end, so
that its wrappers are the outermost, and it joins again whenever a host replaces the list. Known to fit MindSpeed
26.1.0_core_r0.12.1; nothing here was run on an NPU.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import HostError, around, logger, replace
from .megatron_lm import PARSE_ARGS, Plugin, Replacements

_FEATURE = "bitcpm_ternary"
_MANAGER = "mindspeed.features_manager.features_manager.MindSpeedFeaturesManager"
_LAYER_NORM_LINEAR = "mindspeed.te.pytorch.module.layernorm_column_parallel_linear"
ADAPTORS = {"mindspeed": "mindspeed.megatron_adaptor", "mindspeed-llm": "mindspeed_llm.tasks.megatron_adaptor_v2"}


def available(host: str) -> bool:
    """Returns whether a host, ``mindspeed`` or ``mindspeed-llm``, can be imported."""
    return importlib.util.find_spec(host.replace("-", "_")) is not None


def imported_too_early() -> str | None:
    """Returns the adaptor that was imported before ours, and has already applied its features, or None."""
    return next((name for name in ADAPTORS.values() if name in sys.modules), None)


def join(plugin: Plugin) -> None:
    """Puts our feature at the end of MindSpeed's list of features, and keeps it there.

    Displaces ``MindSpeedFeaturesManager.set_features_list``, with which MindSpeed-LLM replaces the whole list.
    """
    from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

    feature = _feature(plugin)

    def with_ours(original: Callable, manager: type, features_list: Iterable) -> None:
        theirs = [f for f in features_list if getattr(f, "feature_name", None) != _FEATURE]
        original(manager, [*theirs, feature])

    replace(f"{_MANAGER}.set_features_list", with_ours)
    MindSpeedFeaturesManager.set_features_list(MindSpeedFeaturesManager.FEATURES_LIST)
    logger.info("joined MindSpeedFeaturesManager.FEATURES_LIST")


def start(host: str) -> None:
    """Imports the host's own adaptor, which applies all features; ours registers the host's linears.

    Raises:
        HostError: if the adaptor did not apply our feature, as in another version, or its linears do not fit.
    """
    importlib.import_module(ADAPTORS[host])
    if not _applied:
        raise HostError(f"{ADAPTORS[host]} did not apply the features of MindSpeedFeaturesManager: another version?")


_applied: list[str] = []


def _feature(plugin: Plugin) -> Any:
    from mindspeed.features_manager.feature import MindSpeedFeature

    ours = Replacements(plugin)
    # The wrappers are made once, because MindSpeed's patcher recognizes them by identity when it patches again.
    wrappers = {symbol: around(replacement) for symbol, replacement in ours.by_symbol.items()}
    # The parser gets our flags from register_args, like those of all features.
    del wrappers[PARSE_ARGS]

    class TernaryFeature(MindSpeedFeature):
        """Our flags and wrappers as a feature of MindSpeed.

        It is always applied: the wrappers themselves check in the validated arguments whether ``--ternary`` is given.
        """

        def __init__(self) -> None:
            super().__init__(_FEATURE, optimization_level=0)

        def is_need_apply(self, args: argparse.Namespace) -> bool:
            return True

        def register_args(self, parser: argparse.ArgumentParser) -> None:
            ours.register_arguments(parser)

        def register_patches(self, patch_manager: Any, args: argparse.Namespace) -> None:
            for symbol, wrapper in wrappers.items():
                patch_manager.register_patch(symbol, wrapper)
            # The emulated Transformer Engine's qkv and fc1 are a column-parallel linear that includes the norm and is
            # no subclass of megatron-core's. Its proj and fc2 are megatron-core's own.
            linear = importlib.import_module(_LAYER_NORM_LINEAR).MindSpeedTELayerNormColumnParallelLinear
            try:
                plugin.register_linear(linear, "column", ("_layernorm", "_rmsnorm"))
            except ValueError as error:
                raise HostError(str(error)) from error
            if getattr(args, "swap_attention", False):
                leave_quantized_weights_on_device(plugin)
            _applied.append(_FEATURE)

    return TernaryFeature()


def leave_quantized_weights_on_device(plugin: Plugin) -> None:
    """Keeps ``--swap-attention`` from treating a quantized weight as an activation.

    Displaces ``mindspeed.core.memory.swap_attention.prefetch.SwapPrefetch.no_swap_tensor``, which recognizes weights by
    their lack of a gradient function; a quantized weight has one. Without this, a weight of 512 KB or more is copied to
    the host and its memory freed after the forward pass, while the layer's next micro-batch uses it: the result is a
    crash or garbage.
    """

    def no_swap_tensor(original: Callable[[torch.Tensor], bool], ori_tensor: torch.Tensor) -> bool:
        return plugin.is_quantized(ori_tensor) or original(ori_tensor)

    replace("mindspeed.core.memory.swap_attention.prefetch.SwapPrefetch.no_swap_tensor", no_swap_tensor)
