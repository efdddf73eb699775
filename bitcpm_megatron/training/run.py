# SPDX-License-Identifier: Apache-2.0
"""The state of a training run: a model with megatron-core's optimizer and schedule, and the result of each step."""

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
    """Everything that a training run changes, and the objective that it trains for.

    Attributes:
        args: the arguments of the run.
        model: the model chunks of this rank.
        optimizer: Adam with fp32 master weights, gradient clipping, and the distributed optimizer if requested.
        scheduler: the learning rate and weight decay over samples, as in Megatron-LM: a warm-up, then constant, linear,
            cosine, inverse-square-root or WSD; and a weight decay that is constant, or goes from its start to its end
            along a line or a cosine.
        objective: the training objective of a micro-batch.
        teacher: the teacher that the objective learns from, or None.
        stored: the store of a teacher's targets that the objective learns from, or None.
        signals: the signals that have asked this process to stop.
        stopping: whether such a signal has reached any process of the job; all processes learn this in the same step.
        iteration: the number of optimizer steps taken.
        consumed_samples: the number of training samples used.
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
        """The share of the quantizer in the next forward pass, rising from 0 to 1 over ``--ternary-ramp-iters``."""
        iterations = self.args.ternary_ramp_iters
        return self.iteration / iterations if self.iteration < iterations else 1.0


@dataclass(frozen=True)
class Step:
    """The results of one optimizer step, for reports and for ``on_step``.

    Attributes:
        iteration: the number of the step, from 1 for the first of a model's training.
        loss: the mean cross entropy over the tokens of the global batch, in nats.
        grad_norm: the norm of the gradient before clipping; None without clipping.
        learning_rate: the learning rate that the step used.
        seconds: the duration of the step.
        codes: the telemetry of :class:`~bitcpm_megatron.parallel.Telemetry`, on rank 0 if it was due; else None.
        run: the run after the step, with ``model.chunks``, ``optimizer``, ``scheduler`` and ``consumed_samples``.
        divergence: the mean divergence from the teacher over the same tokens, in nats times the temperature squared;
            None without a teacher's share in the loss.
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
    """megatron-core's schedule of learning rate and weight decay, with a weight decay that may also fall.

    After ``n`` of ``wd_incr_steps`` samples the weight decay is ``start_wd + c (end_wd - start_wd)``, with
    ``c = n / wd_incr_steps`` for ``linear`` and ``(1 - cos(pi n / wd_incr_steps)) / 2`` for ``cosine``. This is
    upstream's formula (``OptimizerParamScheduler.get_wd``); only upstream's constructor requires that it rises.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, start_wd: float, end_wd: float, **others: Any) -> None:
        super().__init__(optimizer, start_wd=end_wd, end_wd=end_wd, **others)
        self.start_wd = start_wd
        self.step(0)


def build_run(args: argparse.Namespace, model: Model) -> Run:
    """Adds an optimizer and a schedule to a model that was built for training, and returns the run."""
    same = {name: getattr(args, name) for name in _SAME_NAMES}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", params_dtype=params_dtype(args), **same), model.chunks
    )
    if args.ternary_cache == "packed":
        held = pack_weights(model.chunks, optimizer)
    else:
        # The packed gather requires resident weights: if they are impossible, requesting them raises with the reason.
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
