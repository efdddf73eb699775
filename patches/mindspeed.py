# SPDX-License-Identifier: Apache-2.0
"""How MindSpeed and MindSpeed-LLM take us in: the only module that knows ``mindspeed``.

Both apply the features of one list when their adaptor is imported. Ours joins the list before that, at its end, so that
its wrappers are the outermost, and it joins again whenever a host replaces the list. Known to fit MindSpeed
26.1.0_core_r0.12.1; nothing here was run on an NPU.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import torch

from . import ORIGINAL, HostError, logger, replace
from .megatron_lm import Plugin, Wrappers

_FEATURE = "bitcpm_ternary"
_LAYER_NORM_LINEAR = "mindspeed.te.pytorch.module.layernorm_column_parallel_linear"
_SWAP = "mindspeed.core.memory.swap_attention.prefetch"
ADAPTORS = {"mindspeed": "mindspeed.megatron_adaptor", "mindspeed-llm": "mindspeed_llm.tasks.megatron_adaptor_v2"}


def available(host: str) -> bool:
    """Whether ``mindspeed`` or ``mindspeed-llm`` can be imported."""
    return importlib.util.find_spec(host.replace("-", "_")) is not None


def imported_too_early() -> str | None:
    """The adaptor that was imported before ours, and has applied its features already, or None."""
    for name in ADAPTORS.values():
        if name in sys.modules:
            return name
    return None


class LinearsPlugin(Plugin, Protocol):
    """What joins a job under MindSpeed, whose linears and memory have ways of their own."""

    def register_linear(self, linear: type, kind: Literal["column", "row"], norm_methods: tuple[str, ...]) -> None:
        """Makes a class of linears known that megatron-core does not have."""

    def is_quantized(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a quantized weight, as a linear's forward sees it."""


def join(plugin: LinearsPlugin) -> None:
    """Puts our feature at the end of MindSpeed's list, and keeps it there.

    Displaces ``MindSpeedFeaturesManager.set_features_list``, with which MindSpeed-LLM replaces the whole list.
    """
    from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

    feature = _feature(plugin)

    def with_ours(original: Callable) -> Any:  # noqa: ANN401 - a classmethod
        def set_features_list(cls: type, features_list: Iterable) -> None:
            theirs = [f for f in features_list if getattr(f, "feature_name", None) != _FEATURE]
            original([*theirs, feature])

        return classmethod(set_features_list)

    _replace_class_method(MindSpeedFeaturesManager, "set_features_list", with_ours)
    if not any(getattr(f, "feature_name", None) == _FEATURE for f in MindSpeedFeaturesManager.FEATURES_LIST):
        MindSpeedFeaturesManager.FEATURES_LIST.append(feature)
    logger.info("joined MindSpeedFeaturesManager.FEATURES_LIST")


def start(host: str) -> None:
    """Imports the host's own adaptor, which applies all features, and makes its linears known.

    Args:
        host: ``mindspeed`` or ``mindspeed-llm``.

    Raises:
        HostError: the adaptor did not apply our feature, or it is another version.
    """
    importlib.import_module(ADAPTORS[host])
    if not _applied:
        raise HostError(f"{ADAPTORS[host]} did not apply the features of MindSpeedFeaturesManager: another version?")


_applied: list[str] = []


def _feature(plugin: LinearsPlugin) -> Any:  # noqa: ANN401 - a MindSpeedFeature
    from mindspeed.features_manager.feature import MindSpeedFeature

    wrappers = Wrappers(plugin)

    class TernaryFeature(MindSpeedFeature):
        """Our flags and wrappers, as MindSpeed knows features.

        Always applied: whether ``--ternary`` is given the wrappers ask themselves, from validated arguments.
        """

        def __init__(self) -> None:
            super().__init__(_FEATURE, optimization_level=0)

        def is_need_apply(self, args: argparse.Namespace) -> bool:
            return True

        def register_args(self, parser: argparse.ArgumentParser) -> None:
            wrappers.register_arguments(parser)

        def register_patches(self, patch_manager: Any, args: argparse.Namespace) -> None:  # noqa: ANN401
            for symbol, wrapper in wrappers.by_symbol.items():
                # The parser gets our flags from register_args, as it gets those of all features.
                if wrapper != wrappers.parse_args_wrapper:
                    patch_manager.register_patch(symbol, wrapper)
            _register_linears(plugin)
            if getattr(args, "swap_attention", False):
                leave_quantized_weights_on_device(plugin)
            _applied.append(_FEATURE)

    return TernaryFeature()


def _register_linears(plugin: LinearsPlugin) -> None:
    """The emulated Transformer Engine's qkv and fc1: a column-parallel linear with the norm inside, no subclass of
    megatron-core's. Its proj and fc2 are megatron-core's own."""
    module = importlib.import_module(_LAYER_NORM_LINEAR)
    try:
        plugin.register_linear(module.MindSpeedTELayerNormColumnParallelLinear, "column", ("_layernorm", "_rmsnorm"))
    except ValueError as error:
        raise HostError(str(error)) from error


def leave_quantized_weights_on_device(plugin: LinearsPlugin) -> None:
    """Keeps ``--swap-attention`` from taking a quantized weight for an activation.

    Displaces ``SwapPrefetch.no_swap_tensor``, which knows weights by their lack of a gradient function, and quantized
    ones have one. Without this a weight of 512 KB or more is copied to the host and its memory freed after the forward
    pass, while the layer's next micro-batch uses it: a crash, or garbage.
    """

    def make(original: Callable[[torch.Tensor], bool]) -> staticmethod:
        def no_swap_tensor(ori_tensor: torch.Tensor) -> bool:
            return plugin.is_quantized(ori_tensor) or original(ori_tensor)

        # Reading the class gives the function, without the marker of what holds it.
        setattr(no_swap_tensor, ORIGINAL, original)
        return staticmethod(no_swap_tensor)

    replace(importlib.import_module(_SWAP).SwapPrefetch, "no_swap_tensor", make)


def _replace_class_method(owner: type, attribute: str, make: Callable[[Any], Any]) -> None:
    """``patches.replace`` for class methods, whose marker stands on the function inside."""
    original = getattr(owner, attribute)
    if hasattr(original.__func__, ORIGINAL):
        return
    replacement = make(original)
    setattr(replacement.__func__, ORIGINAL, original)
    setattr(owner, attribute, replacement)
    logger.info("patched %s.%s", owner.__name__, attribute)
