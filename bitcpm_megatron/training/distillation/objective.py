# SPDX-License-Identifier: Apache-2.0
"""The objective of a student: a mixture of cross entropy and divergence from its teacher, from one tensor of logits.

In shapes, V is the padded vocabulary size and TP the number of tensor-parallel ranks. ``[seq_length,
micro_batch_size]`` of a packed micro-batch is ``[tokens on this context-parallel rank, 1]``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.models.gpt import GPTModel

from ...objectives.distillation import Divergence, Losses, distillation
from ...objectives.language_modeling import Batch, LossOf, language_modeling, masked_sum
from ...objectives.targets import Targets

TARGETS = "targets"
"""Key of a batch: the teacher's targets of its tokens, ``[seq_length, micro_batch_size]``; only on the last stage."""

_T = TypeVar("_T")


class DistillationObjective:
    """The training objective of a student; its evaluation is that of language modeling.

    The loss is computed where GPTModel computes it, in ``compute_language_model_loss`` of the chunk that has the output
    layer. This method is displaced on that instance, because it gets the logits in their own dtype, and nothing else
    keeps them alive.

    Args:
        chunks: the student's model chunks on this rank, without wrappers.
        rule: the kind of divergence.
        alpha: the share of the divergence in the loss; the rest is cross entropy.
    """

    def __init__(self, chunks: Sequence[GPTModel], rule: Divergence, alpha: float) -> None:
        self._rule, self._alpha = rule, alpha
        # The teacher's targets of the micro-batch that is in the model, and the losses computed from them.
        self._said: Targets | None = None
        self._losses: Losses | None = None
        for chunk in chunks:
            if chunk.post_process:
                original = chunk.compute_language_model_loss
                chunk.compute_language_model_loss = functools.partial(self._compute, original)

    def __call__(self, batch: Batch, model: torch.nn.Module) -> tuple[torch.Tensor, LossOf]:
        """Runs the model on a micro-batch with :data:`TARGETS`; its loss reports ``lm_loss`` and ``distill_loss``."""
        said: Any = batch.get(TARGETS)
        (output, _), losses = self.heed(said, lambda: language_modeling(batch, model))
        return output, functools.partial(_sums, batch["loss_mask"], losses)

    def heed(self, said: Targets | None, forward: Callable[[], _T]) -> tuple[_T, Losses | None]:
        """Runs the model on a micro-batch, with its loss computed against the teacher's targets.

        Args:
            said: the targets of the tokens ``[seq_length, micro_batch_size]``; None on stages without an output layer.
            forward: a function that runs the model, once.

        Returns:
            The result of ``forward``, and the losses of each token, fp32 ``[micro_batch_size, seq_length]``; None if no
            loss was computed.
        """
        self._said = said
        try:
            found = forward()
        finally:
            self._said = None
        losses, self._losses = self._losses, None
        return found, losses

    def _compute(
        self, original: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Computes the loss of each token, ``[micro_batch_size, seq_length]``.

        The labels are int64 ``[micro_batch_size, seq_length]``, the logits ``[seq_length, micro_batch_size, V / TP]``.
        """
        if self._said is None:
            return original(labels, logits)
        found = distillation(logits, labels.t().contiguous(), self._said, self._rule, self._alpha)
        apart = None if found.divergence is None else found.divergence.t().contiguous()
        self._losses = Losses(found.total.t().contiguous(), found.cross_entropy.t().contiguous(), apart)
        return self._losses.total


def _sums(
    mask: torch.Tensor, losses: Losses | None, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss, tokens, reported = masked_sum(mask, total)
    if losses is None:
        return loss, tokens, reported
    _, _, reported = masked_sum(mask, losses.cross_entropy)
    if losses.divergence is not None:
        reported["distill_loss"] = masked_sum(mask, losses.divergence)[2]["lm_loss"]
    return loss, tokens, reported
