# SPDX-License-Identifier: Apache-2.0
"""What a teacher that runs beside a student takes, from what its checkpoint says of itself."""

import argparse
from dataclasses import dataclass, replace

from ...checkpoints.directory import latest
from ...quantization.recipe import Recipe
from ...training.flags import arguments_of
from ..launcher.job import Job
from .shapes import Layout, layout_of

# Elements of the chunks of logits whose divergence is computed at a time, in at most five tensors of fp32.
_CHUNK, _TENSORS = 2**23, 5
# Of one of the likeliest ids of a token: its int32, and the logarithm of its probability in fp32.
_KEPT = 8


@dataclass(frozen=True)
class Teacher:
    """A teacher in the layout of its student."""

    args: argparse.Namespace  # those that its checkpoint records
    layout: Layout
    micro_batches: int  # whose targets are there at a time
    top_k: int | None = None  # ids kept of each token; None for all logits

    @property
    def size(self) -> int:
        """Bytes of an element of its weights."""
        return 2 if self.args.bf16 else 4

    def nbytes(self, stage: int, padded_vocab: int, size: int) -> float:
        """Bytes on a rank of a pipeline stage: its weights, and of a ternary teacher the quantized ones beside them;
        on the last stage what is kept of its logits, and what the divergence needs besides the student's own.

        Its activations are those of one layer at a time, and find room where the student's will be.

        Args:
            stage: from 0.
            padded_vocab: of the student, which it shares.
            size: bytes of an element of the student's logits.
        """
        dense, expert = self.layout.parameters(stage, padded_vocab)
        total = self.size * (dense + expert)
        if isinstance(self.args.ternary_recipe, Recipe):
            quantized = [x for x in self.layout.share(stage) if _is_quantized(self.args.ternary_recipe, x.path)]
            weights = sum(x.weights / (self.layout.ep if x.of_expert else 1) for x in quantized)
            total += self.size * weights / self.layout.tp
        if stage < self.layout.pp - 1:
            return total
        logits = self.layout.tokens * padded_vocab / self.layout.tp
        total += 4 * _TENSORS * min(_CHUNK, logits)
        # The gradient is saved beside the student's logits.
        if self.top_k is None:
            return total + self.size * logits * self.micro_batches + size * logits
        # The teacher's logits are gone before the student has any; of two micro-batches they are there together.
        heard = self.size * min(2, self.micro_batches)
        return total + _KEPT * self.layout.tokens * self.top_k * self.micro_batches + max(heard, size) * logits


def teacher_of(job: Job, args: argparse.Namespace, student: Layout) -> Teacher | None:
    """The teacher that a job names; None where it names none, or there is no checkpoint yet.

    Args:
        job: of the student.
        args: its arguments.
        student: its layout.

    Raises:
        ValueError: what is there cannot be read, or not be split as the student is, with the reason.
    """
    found = None if args.distill_teacher is None else latest(args.distill_teacher)
    if found is None:
        return None
    own = arguments_of(found, student.tp)
    own.micro_batch_size, own.seq_length = student.micro_batch, student.sequence
    layout = layout_of(job, own, student.world, own.vocab_size)
    layout = replace(layout, pp=student.pp, cp=student.cp, ep=student.ep if layout.experts else 1)
    batch = args.global_batch_size or student.micro_batch * student.dp
    # Pipeline stages hear all of a step before the student begins.
    together = max(1, batch // (student.micro_batch * student.dp)) if student.pp > 1 else 1
    return Teacher(own, layout, together, args.distill_top_k)


def _is_quantized(recipe: Recipe, path: str) -> bool:
    matcher = recipe.decide(path)
    return matcher is not None and matcher.config is not None
