# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings of packed documents: every token's own, from position 0 at the start of its document."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams


class RotaryOfDocuments(torch.nn.Module):
    """Takes the place of ``GPTModel.rotary_pos_emb``; for what isn't packed it is the embedding that it was made of.

    megatron-core's own makes one table for the longest document, of which each takes the front. For a LongRoPE, whose
    frequencies are those of a sequence's length, that would let the longest document choose for all the others; and a
    table as long as the row is looked up in another way (``_apply_rotary_pos_emb_thd``). This one makes a table with an
    entry per token, which upstream then only cuts by context-parallel rank.
    """

    def __init__(self, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.rope = rope

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: torch.Tensor,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> Any:
        """What :meth:`forward` gets from ``GPTModel``, which only passes it on: a length, or those of documents.

        With an inference context it is the number of tokens so far: megatron-core takes the context's whole room, by
        which a LongRoPE would choose its frequencies.
        """
        if inference_context is not None:
            return inference_context.sequence_len_offset + len(transformer_input)
        if packed_seq_params is None:
            return self.rope.get_rotary_seq_len(
                inference_context, transformer, transformer_input, transformer_config, None, **others
            )
        return packed_seq_params.cu_seqlens_q.diff().tolist()

    def forward(self, lengths: Any, packed_seq: bool = False, **others: Any) -> torch.Tensor:
        """Angles ``[T, 1, 1, kv_channels]`` in fp32 of all tokens of the row, on every context-parallel rank."""
        if not packed_seq:
            return self.rope(lengths, packed_seq=False, **others)
        return torch.cat([self.rope.get_emb(length) for length in lengths])
