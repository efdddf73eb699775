# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings of packed documents: each token has its own, from position 0 at its document's start."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams


class RotaryOfDocuments(torch.nn.Module):
    """A replacement of ``GPTModel.rotary_pos_emb`` for packed rows; other rows use the original embedding ``rope``.

    megatron-core's own embedding makes one table for the longest document, of which each document takes the front. With
    LongRoPE, whose frequencies depend on the length of a sequence, the longest document would then choose for all the
    others; and a table as long as the row is looked up in another way (``_apply_rotary_pos_emb_thd``). This class makes
    a table with an entry per token, which upstream then only splits by context-parallel rank.
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
        """Returns what ``GPTModel`` passes on to :meth:`forward`: a length, or the lengths of the documents.

        With an inference context it is the number of tokens so far. megatron-core would take the context's whole
        capacity, by which a LongRoPE would choose its frequencies.
        """
        if inference_context is not None:
            return inference_context.sequence_len_offset + len(transformer_input)
        if packed_seq_params is None:
            return self.rope.get_rotary_seq_len(
                inference_context, transformer, transformer_input, transformer_config, None, **others
            )
        return packed_seq_params.cu_seqlens_q.diff().tolist()

    def forward(self, lengths: Any, packed_seq: bool = False, **others: Any) -> torch.Tensor:
        """Returns the fp32 angles ``[T, 1, 1, kv_channels]`` of all T tokens of the row.

        Every context-parallel rank gets all of them. Without ``packed_seq``, they are those of the original embedding.
        """
        if not packed_seq:
            return self.rope(lengths, packed_seq=False, **others)
        return torch.cat([self.rope.get_emb(length) for length in lengths])
