# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of the teacher: whether it exists, and whether it can teach this student."""

import argparse
import importlib.util
from pathlib import Path

from ...checkpoints.directory import CheckpointError
from ...training.mistakes import teaching_mistakes
from ..estimates.teacher import teacher_of
from ..launcher.job import MEGATRON_LM
from .subject import Finding, Subject, failed, judged, passed
from .tokenizer import named

# Cost of a training step in forward passes: one forward, and a backward that costs two.
_PASSES = 3


def check(subject: Subject) -> list[Finding]:
    """Returns the findings of all checks of this module."""
    directory, args, job = subject.args.distill_teacher, subject.args, subject.job
    if directory is None:
        return []
    try:
        teacher = teacher_of(args, subject.layout)
    except (OSError, ValueError) as error:
        return [failed("teacher", str(error), "give the --save directory of a run of ours that this layout can split")]
    if teacher is None:
        before = job.before
        while before is not None and Path(before.flags["save"]) != Path(directory):
            before = before.before
        if before is not None and job.host.kind == MEGATRON_LM:
            said = f"stage {before.stage} will leave a checkpoint of Megatron-LM in {directory}, and teachers are ours"
            return [failed("teacher", said, "train the teacher with the built-in host, or bring it over by way of HF")]
        if before is not None:
            return [passed("teacher", f"stage {before.stage} will leave it in {directory}")]
        cure = "give the --save directory of a run of ours; is the storage mounted here?"
        return [failed("teacher", f"{directory} holds no checkpoint", cure)]
    student = argparse.Namespace(**vars(args), tokenizer_identity=_identity(subject))
    cure = "choose another teacher, or another layout"
    found = [(f"{directory}: {said}", cure) for said in teaching_mistakes(teacher.args, student)]
    weights = teacher.layout.multiplied()
    times = 1 + weights / subject.layout.multiplied() / _PASSES
    kind = "ternary" if teacher.args.ternary else "bf16" if teacher.args.bf16 else "fp32"
    said = f"{directory}: {kind}, {weights / 1e9:.3g} billion weights per token: {times:.1f} times the FLOPs of a step"
    return judged("teacher", said, found)


def _identity(subject: Subject) -> dict[str, str] | None:
    """Returns what identifies the run's tokenizer; None if it cannot be read here, which other checks report."""
    if any(importlib.util.find_spec(name) is None for name in ("numpy", "xxhash", "sentencepiece", "tokenizers")):
        return None
    from ...data.tokenizers import NullTokenizer, open_tokenizer

    if subject.args.mock_data:
        size = subject.args.vocab_size
        return None if size is None else dict(NullTokenizer(size - 1).unique_identifiers)
    try:
        model, kind = named(subject)
        return None if model is None else dict(open_tokenizer(model, kind or None).unique_identifiers)
    except (CheckpointError, ValueError, OSError):
        return None
