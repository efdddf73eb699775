# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: the documents of a micro-batch in one row, split over the ranks of context parallelism.

A packed micro-batch is one row of T tokens (``thd``, in Transformer Engine's terms), whose documents are given by their
cumulative lengths. Rank r of N holds chunks r and 2 N - 1 - r of its 2 N equal chunks, as everywhere in Megatron-LM
(``get_batch_on_this_cp_rank``): this is what megatron-core's rotary embeddings assume.
"""

from collections.abc import Mapping

import torch
from megatron.core.packed_seq_params import PackedSeqParams

CUMULATIVE = "cu_seqlens"
"""Key in a packed batch: int32 ``[documents + 1]``, from 0 to T; on the CPU, because its users loop over it."""
STARTS = "starts"
"""Key in a batch of rows: bool ``[micro_batch_size, seq_length]``, true for the first tokens of documents."""


def starts_after(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """Marks the starts of documents that each end with a token: bool ``[rows, length]`` like ``tokens``."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == end_of_document
    return starts


def pack(batch: Mapping[str, torch.Tensor], rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Packs a micro-batch into one row, and returns the part of this context-parallel rank.

    Args:
        batch: tensors ``[rows, length]`` on the CPU. Every row starts a document, and so do the tokens that
            :data:`STARTS` marks, if it is there.
        rank: the rank of this process.
        ranks: the number of context-parallel ranks; ``rows * length`` must be a multiple of ``2 * ranks``.

    Returns:
        The tensors as ``[1, rows * length / ranks]``, and :data:`CUMULATIVE` of the whole row.
    """
    # Leave out what a dataset records per whole sample, such as the file that a sample comes from.
    rows = {name: value for name, value in batch.items() if name != STARTS and value.shape == batch["tokens"].shape}
    shape = rows["tokens"].shape
    starts = batch[STARTS].clone() if STARTS in batch else torch.zeros(shape, dtype=torch.bool)
    starts[:, 0] = True
    first = starts.flatten().nonzero().flatten()
    ends = torch.cat((first, first.new_tensor([starts.numel()])))
    packed = {name: of_rank(value.reshape(1, -1), 1, rank, ranks) for name, value in rows.items()}
    return {**packed, CUMULATIVE: ends.int()}


def of_rank(whole: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """Returns the chunks of a dimension that a context-parallel rank holds."""
    if ranks == 1:
        return whole
    chunks = whole.chunk(2 * ranks, dim)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim)


def in_order(parts: torch.Tensor, ranks: int) -> torch.Tensor:
    """Restores the order of dimension 0 from the concatenated parts of all ranks; undoes :func:`of_rank`."""
    chunks = parts.chunk(2 * ranks)
    return torch.cat([chunks[2 * i] for i in range(ranks)] + [chunks[2 * i + 1] for i in reversed(range(ranks))])


def by_rank(whole: torch.Tensor, ranks: int) -> torch.Tensor:
    """Concatenates the parts of all ranks from the whole of dimension 0; the inverse of :func:`in_order`."""
    return torch.cat([of_rank(whole, 0, rank, ranks) for rank in range(ranks)])


def packed_seq_params(cumulative: torch.Tensor) -> PackedSeqParams:
    """Returns the parameters that megatron-core passes through its layers for a packed micro-batch.

    ``cu_seqlens_q`` describes the documents. ``cu_seqlens_q_padded``, by which megatron-core looks up rotary
    embeddings, describes the whole row as one: the embedding of every token is in the table already
    (:class:`~bitcpm_megatron.attention.rotary.RotaryOfDocuments`), however the documents are split over ranks.
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
