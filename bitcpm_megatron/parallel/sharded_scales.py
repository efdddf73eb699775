# SPDX-License-Identifier: Apache-2.0
"""The scales in the checkpoint: ``<weight key>.ternary_scale`` next to each ternary weight, sharded like the weight.

An export of the checkpoint needs exactly the scales that training uses: summing in another order moves a scale by one
bf16 step in a few rows of a hundred thousand.

If all layers (and experts) are quantized alike, their scales are stacked into one tensor ``[layers, out, groups]``, as
upstream stacks the weights; otherwise each has a key of its own that ends in its layer number (and expert number).
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ..nn.linear import HostModule, ternary_state
from ..quantization.record import SCALE_SUFFIX
from .linears import parallel_kind, tensor_parallel_group

_left_out = 0


def save_scales_with(module: torch.nn.Module) -> None:
    """Makes a ternary column- or row-parallel linear add its scales to ``sharded_state_dict``."""
    module.__dict__["sharded_state_dict"] = functools.partial(_sharded_state_dict, module)


def without_scales(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a nested sharded state dict without its scales, for loading, which derives them from the weights."""
    return {
        key: without_scales(value) if isinstance(value, dict) else value
        for key, value in state.items()
        if SCALE_SUFFIX not in str(key)
    }


@contextlib.contextmanager
def scales_left_out() -> Iterator[None]:
    """Context in which ``sharded_state_dict`` of any model omits the scales.

    It is for hosts that build what they request of a checkpoint where this package cannot filter it.
    """
    global _left_out
    _left_out += 1
    try:
        yield
    finally:
        _left_out -= 1


def _sharded_state_dict(
    self: HostModule, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> ShardedStateDict:
    state = type(self).sharded_state_dict(self, prefix, sharded_offsets, metadata)
    ternary = ternary_state(self)
    tensor_group = tensor_parallel_group(self)
    if _left_out or ternary is None or tensor_group is None:
        return state
    key = f"{prefix}weight{SCALE_SUFFIX}"
    if not ternary.like_all_layers:
        key += "".join(f".{n}" for n in re.findall(r"\.(?:layers|local_experts)\.(\d+)\.", ternary.name))
        sharded_offsets = ()
    # These are the scales of the present weight: since those of the last forward, an optimizer step has changed it.
    _, scales = ternary.quantize(self.weight)
    row_parallel = parallel_kind(self) == "row"
    data_group = (metadata or {}).get("dp_cp_group") or parallel_state.get_data_parallel_group(
        with_context_parallel=True
    )
    sharded = ShardedTensor.from_rank_offsets(
        key,
        scales,
        *sharded_offsets,
        (len(sharded_offsets) + (1 if row_parallel else 0), tensor_group.rank(), tensor_group.size()),
        replica_id=(0, 0, data_group.rank()),
        prepend_axis_num=len(sharded_offsets),
    )
    if self.config.gated_linear_unit and prefix.endswith("linear_fc1."):
        # MLP.sharded_state_dict splits gate and up of the weight only; the scales must be split alike.
        sharded = apply_swiglu_sharded_factory(sharded, sharded_offsets)
    state[key] = sharded
    return state
