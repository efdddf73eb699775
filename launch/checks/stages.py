# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of stages: whether each stage of a job can follow the preceding one."""

from pathlib import Path

from ...checkpoints.compatibility import check_arguments
from ...files import FileError
from ...quantization.record import QuantizerRecord, RecordError, check_change
from ..estimates.quantizer import expected_record
from ..launcher.job import JobError
from ..launcher.torchrun import next_stage
from .checkpoint import filled
from .subject import Finding, Subject, failed, in_turn, passed
from .training import row_parallel_shards


def _order(subject: Subject) -> list[Finding]:
    """Checks that the checkpoints on the disk were written in the order of the stages."""
    jobs = [subject.job]
    while jobs[0].before is not None:
        jobs.insert(0, jobs[0].before)
    try:
        next_stage(jobs)
    except JobError as error:
        return [failed("stages", *str(error).removeprefix(f"{subject.job.path}: ").rsplit(": ", 1))]
    except (FileError, OSError):
        return []  # reported by the checks of the stage with that directory
    return [] if len(jobs) == 1 else [passed("stages", " -> ".join(str(job.stage) for job in jobs))]


def _weights(subject: Subject) -> list[Finding]:
    """Checks that the stage can start from the weights of the preceding one, before these weights exist.

    Once they exist, the checks of the checkpoint compare them.
    """
    job, name = subject.job, "stage-weights"
    if job.before is None or subject.checkpoint() is not None:
        return []
    first = job.before.flags["save"]
    if job.flags["pretrained-checkpoint"] != first:
        return []
    before = Subject(job.before, subject.place, subject.environ)
    args, earlier = filled(subject), filled(before)
    args.finetune = True
    if None in (args.vocab_size, earlier.vocab_size):
        args.vocab_size = earlier.vocab_size
    try:
        check_arguments(args, vars(earlier), Path(first), with_optimizer=False)
        check_change(Path(first), _record(before), _record(subject), args.allow_quantizer_change)
    except (FileError, RecordError) as error:
        return [failed(name, str(error), f"give the flags of stage {job.before.stage}")]
    except ValueError as error:
        return [failed(name, str(error), "see the finding on the quantizer")]
    return [passed(name, f"the model of stage {job.before.stage}")]


def _record(subject: Subject) -> QuantizerRecord | None:
    """Returns the quantizer record of the checkpoints that a stage will save, or None if it is not ternary."""
    ternary = subject.args.ternary
    return expected_record(subject.layout, subject.args, row_parallel_shards(subject)) if ternary else None


check = in_turn(_order, _weights)
