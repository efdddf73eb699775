# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose model also learns from a teacher: any causal model of Transformers with the same tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer

_IGNORED = -100
# Number of tokens whose logits are converted to fp32 at a time.
_CHUNK = 1024


@dataclass
class DistillationArguments:
    """The teacher, and its weight in the loss."""

    teacher: str | None = field(default=None, metadata={"help": "directory of a model of the same tokenizer"})
    distill_alpha: float = field(default=1.0, metadata={"help": "share of the teacher in the loss"})
    distill_temperature: float = field(default=1.0, metadata={"help": "of both softmaxes"})


def load_teacher(arguments: DistillationArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """Loads the teacher in its own dtype, without running code from its directory; returns None if none is named.

    Raises:
        ValueError: if the teacher cannot be loaded, its tokens differ from the student's, or flags need a teacher.
    """
    if arguments.teacher is None:
        if (arguments.distill_alpha, arguments.distill_temperature) != (1.0, 1.0):
            raise ValueError("--distill_alpha and --distill_temperature need --teacher")
        return None
    directory = Path(arguments.teacher)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        own = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a damaged file can make the many readers inside raise anything
        raise ValueError(f"--teacher {directory}: Transformers cannot load it ({error})") from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {directory}: its tokens are others than those of the model that is trained")
    return model.requires_grad_(False).eval()


class DistillingTrainer(Trainer):
    """A Trainer with the loss (1 - alpha) cross entropy + alpha T^2 KL(teacher || student), over tokens with a label.

    Without a teacher it is the plain Trainer. Evaluation is always cross entropy.

    Args:
        teacher: the model from :func:`load_teacher`.
        arguments: the share alpha of the teacher in the loss, and the temperature T.
        vocab_size: the number of ids of the tokenizer; rows beyond it, which models pad differently, are not compared.
        options: the arguments of ``transformers.Trainer``.
    """

    def __init__(
        self, teacher: PreTrainedModel | None, arguments: DistillationArguments, vocab_size: int, **options: Any
    ) -> None:
        super().__init__(**options, compute_loss_func=None if teacher is None else self._mixture)
        self._teacher, self._arguments, self._vocab_size = teacher, arguments, vocab_size
        self._said: torch.Tensor | None = None
        if teacher is not None:
            self._teacher = teacher.to(self.args.device)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Computes the loss, in training after the teacher's logits for the same tokens."""
        if self._teacher is not None and model.training:
            with torch.no_grad():
                asked = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
                self._said = self._teacher(**asked, use_cache=False).logits
        try:
            return super().compute_loss(model, inputs, *args, **options)
        finally:
            self._said = None

    def _mixture(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Returns this micro-batch's part of the loss: its sum over tokens, divided by the tokens of the whole step.

        ``labels`` has the shape [batch, sequence], ``outputs.logits`` [batch, sequence, vocabulary].
        """
        counted = labels[:, 1:] != _IGNORED
        wanted, logits = labels[:, 1:][counted], outputs.logits[:, :-1][counted]
        said = None if self._said is None else self._said[:, :-1][counted]
        alpha = 0.0 if said is None else self._arguments.distill_alpha
        total = logits.new_zeros((), dtype=torch.float32)
        for start in range(0, len(wanted), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            part = logits[chunk].float()
            if alpha < 1:
                total = total + (1 - alpha) * cross_entropy(part, wanted[chunk], reduction="sum")
            if said is not None and alpha > 0:
                total = total + alpha * self._apart(part, said[chunk].float())
        return total / (len(wanted) if num_items_in_batch is None else num_items_in_batch)

    def _apart(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        temperature = self._arguments.distill_temperature
        q, p = ((x[:, : self._vocab_size] / temperature).log_softmax(-1) for x in (student, teacher))
        return temperature**2 * kl_div(q, p, reduction="sum", log_target=True)
