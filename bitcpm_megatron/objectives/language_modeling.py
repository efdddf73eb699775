# SPDX-License-Identifier: Apache-2.0
"""The objective of pretraining, to predict the next token, and the interface of all objectives."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..attention.documents import CUMULATIVE, packed_seq_params

Batch = Mapping[str, torch.Tensor]
"""A micro-batch: ``tokens``, ``labels`` and ``position_ids`` int64, ``loss_mask`` float; all
``[micro_batch_size, seq_length]``, or one packed row with the cumulative lengths of its documents, as
:func:`~bitcpm_megatron.attention.documents.pack` makes it."""

LossOf = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
"""A function from a model's output to the sum of the losses, the number of tokens, and reports ``[sum, tokens]`` by
name."""


Objective = Callable[[Batch, torch.nn.Module], tuple[torch.Tensor, LossOf]]
"""A function that runs the model on a micro-batch on its device, and returns the output and how it becomes a loss.
Megatron's schedules call the latter on the last pipeline stage only."""


def language_modeling(batch: Batch, model: torch.nn.Module) -> tuple[torch.Tensor, LossOf]:
    """Runs a GPTModel, or a stage of one, for the cross entropy of the next tokens that ``loss_mask`` counts."""
    packed = {"packed_seq_params": packed_seq_params(batch[CUMULATIVE])} if CUMULATIVE in batch else {}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **packed)
    return output, partial(masked_sum, batch["loss_mask"])


def masked_sum(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sums the losses of the tokens that a mask counts, for :data:`LossOf`; both tensors have one element per token."""
    mask = mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.int(), {"lm_loss": torch.stack((total.detach(), tokens))}
