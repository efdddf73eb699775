# SPDX-License-Identifier: Apache-2.0
"""Core attention for megatron-core's local layers: packed sequences, sliding windows in them, context parallelism.

By themselves these layers have none of these, and store T x T scores for T tokens.

:class:`CoreAttention` is used where megatron-core accepts substitutes: ``core_attention`` of a layer spec's
``SelfAttentionSubmodules`` (``megatron/core/models/backends.py``). There it displaces ``DotProductAttention``. It keeps
the meanings of ``softmax_scale``, ``window_size`` and dropout, for which it draws random numbers in the same way.
"""

import contextlib
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from .kernels import Weighting, attend_documents, attend_rows
from .ulysses import over_heads


def give_core_attention(layers: ModuleSpec) -> ModuleSpec:
    """Puts :class:`CoreAttention` into the spec of a transformer layer with self attention, and returns the spec."""
    layers.submodules.self_attention.submodules.core_attention = CoreAttention
    return layers


class CoreAttention(MegatronModule):
    """Causal attention within rows, or within the documents of a packed row; over Ulysses if ranks share tokens.

    Args:
        config: the configuration; ``window_size`` is None or ``(W, 0)``, and ``softmax_scale`` is None for
            ``kv_channels ** -0.5``.

    Raises:
        ValueError: if the configuration asks for a feature that this class does not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        # Not in megatron-core 0.12.
        softmax = getattr(config, "softmax_type", "vanilla")
        foreign = {
            "attention that isn't causal": attn_mask_type != AttnMaskType.causal,
            "cross attention": attention_type != "self",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            f"softmax_type {softmax}": softmax != "vanilla",
            f"cp_comm_type {cp_comm_type}": config.context_parallel_size > 1 and cp_comm_type != "a2a",
            "a window to the right": config.window_size is not None and config.window_size[1] != 0,
        }
        if any(foreign.values()):
            raise ValueError(f"core attention has no {', '.join(name for name, asked in foreign.items() if asked)}")
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.window = None if config.window_size is None else config.window_size[0]
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        given = getattr(pg_collection, "cp", None)
        self.group = parallel_state.get_context_parallel_group() if given is None else given

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Computes attention of this rank's tokens.

        Args:
            query: the queries ``[length, rows, heads, d]``, or ``[tokens of this rank, heads, d]`` of a packed row,
                with heads of size d.
            key: the keys, shaped likewise with the heads of key and value; for rows also those of the tokens before the
                queries, if megatron-core's inference context kept them.
            value: the values, shaped like ``key``.
            attention_mask: None, for attention is causal.
            attn_mask_type: the kind of mask, which changes nothing.
            attention_bias: None.
            packed_seq_params: the result of :func:`~bitcpm_megatron.attention.documents.packed_seq_params`, or None.

        Returns:
            The weighted values ``[length, rows, heads * d]``, or ``[tokens of this rank, heads, d]``.

        Raises:
            ValueError: if there is a mask or a bias, which would have no effect.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("core attention takes no mask and no bias: documents are told by their lengths")
        dropout = self.dropout if self.training else 0.0
        weighting = Weighting(self.scale, self.window, dropout)
        # As upstream: ranks that hold other heads of the same tokens must not drop the same weights.
        fork = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            if packed_seq_params is None:
                return attend_rows(query, key, value, weighting).flatten(2)
            attend = partial(attend_documents, weighting=weighting, cumulative=packed_seq_params.cu_seqlens_q)
            if self.group.size() == 1:
                return attend(query, key, value)
            return over_heads(attend, query, key, value, self.group)
