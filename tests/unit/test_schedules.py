# SPDX-License-Identifier: Apache-2.0
"""Tests of settings that change from step to step: their values, and their continuation in a resumed run."""

import argparse
import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel

from bitcpm_megatron.checkpoints.directory import CheckpointError, latest
from bitcpm_megatron.nn.cache import find_epoch
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.training import checkpoint
from bitcpm_megatron.training.flags import arguments_of, parse_args
from bitcpm_megatron.training.loop import pretrain
from bitcpm_megatron.training.run import Schedule, Step

RUN = """
    --num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-decay-style constant --eval-iters 0
    --mock-data --vocab-size 100 --ternary --bf16 --attention-dropout 0 --hidden-dropout 0
""".split()
UNQUANTIZED = [flag for flag in RUN if flag != "--ternary"]
FALLING = "--weight-decay-incr-style linear --start-weight-decay 8 --end-weight-decay 0".split()


def schedule(start: float, end: float, style: str, **more: Any) -> Schedule:
    """Makes a schedule of ten steps with three samples each, for two parameter groups, of which one decays."""
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]
    settings = {"init_lr": 0.0, "max_lr": 1.0, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_steps": 30}
    settings |= {"lr_decay_style": "constant", "wd_incr_steps": 30, "use_checkpoint_opt_param_scheduler": False}
    optimizer = types.SimpleNamespace(param_groups=groups)
    return Schedule(optimizer, start_wd=start, end_wd=end, wd_incr_style=style, **{**settings, **more})


def decays(of: Schedule, steps: int) -> list[float]:
    """Returns the weight decay of each of the next steps."""
    found = []
    for _ in range(steps):
        decayed, other = of.optimizer.param_groups
        assert other["weight_decay"] == 0
        found.append(decayed["weight_decay"])
        of.step(3)
    return found


@pytest.mark.parametrize(
    ("start", "end", "style", "expected"),
    [
        (0.1, 0.0, "linear", [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.0, 0.0]),
        (0.0, 0.1, "linear", [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.1]),
        # The values are (1 + cos(pi k / 10)) / 2; the cosines of 36 and 72 degrees are (sqrt(5) +- 1) / 4.
        (1.0, 0.0, "cosine", {0: 1.0, 2: (5 + 5**0.5) / 8, 4: (3 + 5**0.5) / 8, 5: 0.5, 10: 0.0, 11: 0.0}),
        (0.1, 0.1, "constant", [0.1] * 12),
    ],
)
def test_weight_decay_goes_from_its_start_to_its_end(start: float, end: float, style: str, expected: Any) -> None:
    found = decays(schedule(start, end, style), 12)
    wanted = expected if isinstance(expected, dict) else dict(enumerate(expected))
    assert {step: found[step] for step in wanted} == pytest.approx(wanted, abs=1e-15)


def resumed(state: dict, own: Schedule, **choice: bool) -> list[float]:
    choices = {"override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False, **choice}
    args = argparse.Namespace(lr=1.0, min_lr=0.0, **choices)
    checkpoint._load_schedule(
        types.SimpleNamespace(scheduler=own, args=args, optimizer=own.optimizer), Path("x"), state
    )
    return decays(own, 8)


def test_a_resumed_schedule_goes_on_where_it_stopped() -> None:
    stopped = schedule(0.1, 0.0, "cosine")
    whole = [*decays(stopped, 4), *resumed(stopped.state_dict(), schedule(0.1, 0.0, "cosine"))]
    assert whole == decays(schedule(0.1, 0.0, "cosine"), 12)


def test_a_resumed_schedule_of_another_weight_decay_is_refused_or_chosen() -> None:
    stopped = schedule(0.1, 0.0, "linear")
    decays(stopped, 4)
    state = stopped.state_dict()
    for other in (schedule(0.2, 0.0, "linear"), schedule(0.1, 0.05, "linear"), schedule(0.1, 0.0, "cosine")):
        with pytest.raises(CheckpointError, match="weight decay.*--override-opt-param-scheduler"):
            resumed(state, other)
    theirs = schedule(0.5, 0.5, "constant", use_checkpoint_opt_param_scheduler=True)
    # The checkpoint's schedule applies from the next step on.
    assert resumed(state, theirs, use_checkpoint_opt_param_scheduler=True) == decays(stopped, 8)
    ours = schedule(0.5, 0.5, "constant", override_opt_param_scheduler=True)
    assert resumed(state, ours, override_opt_param_scheduler=True) == [0.5] * 8


@dataclasses.dataclass
class Taken:
    """The loss of a step, the master weights after it, and the weight decay of the next step."""

    loss: float
    masters: list[torch.Tensor]
    decay: float


def taken(*flags: str, base: Sequence[str] = RUN) -> list[Taken]:
    """Runs a training, and returns its steps."""
    steps: list[Taken] = []

    def watch(step: Step) -> None:
        groups = step.run.optimizer.param_groups
        made = [p.detach().clone() for group in groups for p in group["params"]]
        steps.append(Taken(step.loss, made, max(group["weight_decay"] for group in groups)))

    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    pretrain(parse_args([*base, *flags], 1), on_step=watch)
    return steps


def equal(some: Taken, other: Taken) -> bool:
    pairs = zip(some.masters, other.masters, strict=True)
    return (some.loss, some.decay) == (other.loss, other.decay) and all(torch.equal(a, b) for a, b in pairs)


def test_each_step_is_taken_with_the_weight_decay_of_its_moment(single_rank: None) -> None:
    falls, stays = taken(*FALLING), taken("--weight-decay", "8")
    assert [step.decay for step in falls] == [6, 4, 2, 0] and {step.decay for step in stays} == {8}
    # The first step uses the initial decay, so that weights differ only after the second step.
    assert all(torch.equal(a, b) for a, b in zip(falls[0].masters, stays[0].masters, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(falls[1].masters, stays[1].masters, strict=True) if a.dim() == 2)


def test_a_ramp_begins_in_full_precision_and_goes_on_with_a_part_of_the_quantizer(single_rank: None) -> None:
    ramp = taken("--ternary-ramp-iters", "2")
    in_full = taken(base=UNQUANTIZED)
    assert equal(ramp[0], in_full[0])
    ternary = taken()
    assert ramp[1].loss not in (in_full[1].loss, ternary[1].loss), "half of the quantizer"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_steps(single_rank: None, tmp_path: Path) -> None:
    flags = [*FALLING, "--ternary-ramp-iters", "3"]
    whole, saved = taken(*flags), ["--save", str(tmp_path), "--load", str(tmp_path), "--exit-interval", "2"]
    begun = taken(*flags, *saved)
    found = latest(tmp_path)
    record = QuantizerRecord.read(found)
    assert record.ramp == 2 / 3
    model = checkpoint.trained_model(arguments_of(found, 1), found, 128)
    assert {epoch.ramp for epoch in map(find_epoch, model.bare)} == {2 / 3}
    for others in ([], ["--ternary-ramp-iters", "2"]):
        with pytest.raises(CheckpointError, match="--ternary-ramp-iters 3 .now [02].: the quantizer would jump"):
            taken(*FALLING, *others, *saved)
    parts = [*begun, *taken(*flags, *saved)]
    assert all(equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert QuantizerRecord.read(latest(tmp_path)) == dataclasses.replace(record, ramp=1.0)


@pytest.mark.slow
def test_a_ramp_that_is_over_changes_no_bit(single_rank: None, tmp_path: Path) -> None:
    saved = ["--save", str(tmp_path), "--exit-interval", "2"]
    taken("--ternary-ramp-iters", "2", *saved)
    over = ["--load", str(tmp_path), "--exit-interval", "4"]
    # With the flag, parameters hold latent weights and quantized ones are cached; without it, parameters are quantized.
    on_it, none = taken("--ternary-ramp-iters", "2", *over), taken(*over)
    assert len(on_it) == len(none) == 2 and all(equal(a, b) for a, b in zip(on_it, none, strict=True))
