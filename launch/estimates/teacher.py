# SPDX-License-Identifier: Apache-2.0
"""Estimate of the memory of a teacher that runs beside its student, from the arguments in its checkpoint."""

import argparse
from dataclasses import dataclass, replace

from ...checkpoints.directory import latest
from ...quantization.recipe import Recipe
from ...training.flags import arguments_of
from .shapes import Layout, layout_of

# The divergence is computed for this many logits at a time, in at most this many fp32 tensors.
_CHUNK, _TENSORS = 2**23, 5
# Bytes per kept id of a token: the id in int32, and the logarithm of its probability in fp32.
_KEPT = 8


@dataclass(frozen=True)
class Teacher:
    """A teacher in the parallel layout of its student."""

    args: argparse.Namespace  # the arguments that its checkpoint records
    layout: Layout
    micro_batches: int  # number of micro-batches whose targets are held at the same time
    top_k: int | None = None  # number of ids kept per token; None for all logits

    @property
    def size(self) -> int:
        """The size of an element of its weights, in bytes."""
        return 2 if self.args.bf16 else 4

    def nbytes(self, stage: int, padded_vocab: int, size: int) -> float:
        """Returns the bytes that the teacher takes on a rank of a pipeline stage.

        These are its weights and, if it is ternary, the quantized ones beside them; on the last stage also the part of
        its logits that is kept, and what the divergence needs besides the student's own logits. Its activations are
        those of one layer at a time, and fit into the memory that the student's will take.

        Args:
            stage: the number of the pipeline stage, from 0.
            padded_vocab: the padded vocabulary size of the student, which the teacher shares.
            size: the size of an element of the student's logits, in bytes.
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
        # The gradient is stored beside the student's logits.
        if self.top_k is None:
            return total + self.size * logits * self.micro_batches + size * logits
        # The teacher's logits are freed before the student has any. Those of two micro-batches exist at the same time.
        heard = self.size * min(2, self.micro_batches)
        return total + _KEPT * self.layout.tokens * self.top_k * self.micro_batches + max(heard, size) * logits


def teacher_of(args: argparse.Namespace, student: Layout) -> Teacher | None:
    """Returns the teacher that a job names; None if it names none, or there is no checkpoint yet.

    Args:
        args: the arguments of the student.
        student: the layout of the student.

    Raises:
        ValueError: if the checkpoint cannot be read, or not be split like the student; the message has the reason.
    """
    found = None if args.distill_teacher is None else latest(args.distill_teacher)
    if found is None:
        return None
    own = arguments_of(found, student.tp)
    own.micro_batch_size, own.seq_length = student.micro_batch, student.sequence
    layout = layout_of(own, student.world, own.vocab_size)
    layout = replace(layout, pp=student.pp, cp=student.cp, ep=student.ep if layout.experts else 1)
    batch = args.global_batch_size or student.micro_batch * student.dp
    # With pipeline stages the teacher processes all micro-batches of a step before the student begins.
    together = max(1, batch // (student.micro_batch * student.dp)) if student.pp > 1 else 1
    return Teacher(own, layout, together, args.distill_top_k)


def _is_quantized(recipe: Recipe, path: str) -> bool:
    matcher = recipe.decide(path)
    return matcher is not None and matcher.config is not None
