# SPDX-License-Identifier: Apache-2.0
"""What a training run moves: a model with megatron-core's optimizer and learning-rate schedule; and each step of it."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ..objectives.language_modeling import Objective, language_modeling
from ..parallel.estimators import shape_gradients
from ..parallel.packed.gather import gather_packed
from ..parallel.packed.weights import pack_weights
from ..parallel.resident import hold_in_parameters
from .model import Model, params_dtype

if TYPE_CHECKING:
    from .distillation.store import StoredTargets
    from .distillation.teacher import Teacher

_SAME_NAMES = (
    "lr min_lr weight_decay bf16 adam_beta1 adam_beta2 adam_eps clip_grad use_distributed_optimizer "
    "overlap_param_gather"
).split()


@dataclass
class Run:
    """Everything that a training run moves, and what for.

    Attributes:
        optimizer: Adam with fp32 master weights, gradient clipping, and the distributed optimizer where asked for.
        scheduler: learning rate and weight decay over samples, as in Megatron-LM: warm-up, then constant / linear /
            cosine / WSD; and a decay that is constant, or linear / cosine from its start to its end.
        objective: what a micro-batch is trained for.
        teacher: that the objective learns from, or None.
        stored: what a teacher said before, that the objective learns from; or None.
        signals: that asked this process to stop.
        stopping: whether one has reached any process of the job, as all of them learned in the same step.
        iteration: optimizer steps taken.
        consumed_samples: training samples used.
    """

    args: argparse.Namespace
    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective: Objective = language_modeling
    teacher: "Teacher | None" = None
    stored: "StoredTargets | None" = None
    signals: list[int] = field(default_factory=list)
    stopping: bool = False
    iteration: int = 0
    consumed_samples: int = 0

    @property
    def ramp(self) -> float:
        """How much of the quantizer the next forward uses: from 0 up to 1, where ``--ternary-ramp-iters`` are over."""
        iterations = self.args.ternary_ramp_iters
        return self.iteration / iterations if self.iteration < iterations else 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step, as those are told who watch a run.

    Attributes:
        iteration: its number, from 1 for the first of a model's training.
        loss: mean over the tokens of the global batch, in nats.
        grad_norm: before clipping; None without clipping.
        learning_rate: that the step used.
        seconds: it took.
        codes: telemetry, on rank 0 and where it was due (see :class:`~bitcpm_megatron.parallel.Telemetry`).
        run: after the step: its ``model.chunks``, ``optimizer``, ``scheduler`` and ``consumed_samples``.
        divergence: from the teacher, mean over the same tokens, in nats times the temperature squared; None without.
    """

    iteration: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    seconds: float
    codes: Mapping[str, Mapping[str, Any]] | None
    run: Run
    divergence: float | None = None


class Schedule(OptimizerParamScheduler):
    """megatron-core's schedule of learning rate and weight decay, whose weight decay may fall, too.

    After ``n`` of ``wd_incr_steps`` samples the weight decay is ``start_wd + c (end_wd - start_wd)``, with
    ``c = n / wd_incr_steps`` for ``linear`` and ``(1 - cos(pi n / wd_incr_steps)) / 2`` for ``cosine``. That is
    upstream's formula (``OptimizerParamScheduler.get_wd``), of which its constructor alone demands that it rises.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, start_wd: float, end_wd: float, **others: Any) -> None:
        super().__init__(optimizer, start_wd=end_wd, end_wd=end_wd, **others)
        self.start_wd = start_wd
        self.step(0)


def build_run(args: argparse.Namespace, model: Model) -> Run:
    """Optimizer and schedule for a model that was built for training."""
    same = {name: getattr(args, name) for name in _SAME_NAMES}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", params_dtype=params_dtype(args), **same), model.chunks
    )
    if args.ternary_cache == "packed":
        held = pack_weights(model.chunks, optimizer)
    else:
        # The packed gather is of resident weights alone: where they cannot be, this says why.
        cache = "resident" if args.ternary_param_gather == "packed" else args.ternary_cache
        if args.ternary_ramp_iters and cache == "auto":
            held = (
                "cache: step, a quantized weight beside each latent one (not resident: --ternary-ramp-iters needs both)"
            )
        else:
            held = hold_in_parameters(model.chunks, optimizer, cache)
    shaped = shape_gradients(model.chunks, optimizer, args.ternary_estimator)
    model.notes += filter(None, [held, gather_packed(model.chunks, args.ternary_param_gather), shaped])
    model.config.grad_scale_func = optimizer.scale_loss
    samples, wsd = args.global_batch_size, args.lr_wsd_decay_iters
    falls_or_rises = args.weight_decay_incr_style != "constant"
    scheduler = Schedule(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * samples,
        lr_decay_steps=args.lr_decay_iters * samples,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay if falls_or_rises else args.weight_decay,
        end_wd=args.end_weight_decay if falls_or_rises else args.weight_decay,
        wd_incr_steps=args.train_iters * samples,
        wd_incr_style=args.weight_decay_incr_style,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        wsd_decay_steps=None if wsd is None else wsd * samples,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
    return Run(args, model, optimizer, scheduler)
