# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: the documents of a micro-batch one behind the other, as cumulative lengths, cut over the ranks of
context parallelism.

A packed micro-batch is one row of T tokens (``thd``, in the words of Transformer Engine). Rank r of N holds chunks r
and 2 N - 1 - r of its 2 N equal chunks, as everywhere in Megatron-LM (``get_batch_on_this_cp_rank``): this is what
megatron-core's rotary embeddings assume.
"""

from collections.abc import Mapping

import torch
from megatron.core.packed_seq_params import PackedSeqParams

CUMULATIVE = "cu_seqlens"
"""In a packed batch: int32 ``[documents + 1]``, from 0 to T; on the CPU, for who uses it loops over it."""
STARTS = "starts"
"""In a batch of rows: bool ``[micro_batch_size, seq_length]``, the first tokens of documents."""


def starts_after(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """Where documents start that each end with a token: bool, of the shape of ``tokens`` ``[rows, length]``."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == end_of_document
    return starts


def pack(batch: Mapping[str, torch.Tensor], rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """This context-parallel rank's part of a micro-batch, as one packed row.

    Args:
        batch: tensors ``[rows, length]`` on the CPU. Every row starts a document, and so do the tokens that
            :data:`STARTS` says, where it is there.
        rank: of this process among ``ranks``; ``rows * length`` must be a multiple of ``2 * ranks``.

    Returns:
        The tensors as ``[1, rows * length / ranks]``, and :data:`CUMULATIVE` of the whole row.
    """
    # Not what a dataset says of whole samples, such as which of several files one is from.
    rows = {name: value for name, value in batch.items() if name != STARTS and value.shape == batch["tokens"].shape}
    shape = rows["tokens"].shape
    starts = batch[STARTS].clone() if STARTS in batch else torch.zeros(shape, dtype=torch.bool)
    starts[:, 0] = True
    first = starts.flatten().nonzero().flatten()
    ends = torch.cat((first, first.new_tensor([starts.numel()])))
    packed = {name: of_rank(value.reshape(1, -1), 1, rank, ranks) for name, value in rows.items()}
    return {**packed, CUMULATIVE: ends.int()}


def of_rank(whole: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """The chunks of a dimension that a context-parallel rank holds."""
    if ranks == 1:
        return whole
    chunks = whole.chunk(2 * ranks, dim)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim)


def in_order(parts: torch.Tensor, ranks: int) -> torch.Tensor:
    """The whole of dimension 0 from the parts of all ranks, one behind the other; undoes :func:`of_rank`."""
    chunks = parts.chunk(2 * ranks)
    return torch.cat([chunks[2 * i] for i in range(ranks)] + [chunks[2 * i + 1] for i in reversed(range(ranks))])


def by_rank(whole: torch.Tensor, ranks: int) -> torch.Tensor:
    """The parts of all ranks, one behind the other, from the whole of dimension 0; the inverse of :func:`in_order`."""
    return torch.cat([of_rank(whole, 0, rank, ranks) for rank in range(ranks)])


def packed_seq_params(cumulative: torch.Tensor) -> PackedSeqParams:
    """What megatron-core hands through its layers for a packed micro-batch.

    ``cu_seqlens_q`` are the documents. ``cu_seqlens_q_padded``, by which megatron-core looks up rotary embeddings, is
    the whole row as one: the embedding of every token is in the table already
    (:class:`~bitcpm_megatron.attention.rotary.RotaryOfDocuments`), however documents lie across ranks.
    """
    longest = int(cumulative.diff().max())
    whole = cumulative[[0, -1]]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
