# SPDX-License-Identifier: Apache-2.0
"""Predict the next token: what pretraining minimises, and the form that every other objective has."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..attention.documents import CUMULATIVE, packed_seq_params

Batch = Mapping[str, torch.Tensor]
"""``tokens``, ``labels`` and ``position_ids`` int64, ``loss_mask`` float; all ``[micro_batch_size, seq_length]``, or
one packed row with the lengths of its documents: see :func:`~bitcpm_megatron.attention.documents.pack`."""

LossOf = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
"""From a model's output to the loss sum, the tokens it is over, and by name what is reported: ``[sum, tokens]``."""


Objective = Callable[[Batch, torch.nn.Module], tuple[torch.Tensor, LossOf]]
"""What a micro-batch, on the model's device, is trained for: runs the model, and says how its output becomes a loss.
Megatron's schedules call the second part on the last pipeline stage alone."""


def language_modeling(batch: Batch, model: torch.nn.Module) -> tuple[torch.Tensor, LossOf]:
    """Cross entropy of the next token, over the tokens that ``loss_mask`` counts; of a GPTModel or a stage of one."""
    packed = {"packed_seq_params": packed_seq_params(batch[CUMULATIVE])} if CUMULATIVE in batch else {}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **packed)
    return output, partial(masked_sum, batch["loss_mask"])


def masked_sum(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    mask = mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.int(), {"lm_loss": torch.stack((total.detach(), tokens))}
