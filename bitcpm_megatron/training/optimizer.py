# SPDX-License-Identifier: Apache-2.0
"""Optimizer and learning-rate schedule, both megatron-core's."""

import argparse

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from .model import Model, params_dtype


def build_optimizer(args: argparse.Namespace, model: Model) -> MegatronOptimizer:
    """Adam with fp32 master weights, gradient clipping, and the distributed optimizer where asked for."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        bf16=args.bf16,
        params_dtype=params_dtype(args),
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, model.chunks)
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(args: argparse.Namespace, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning rate over samples, as in Megatron-LM: warm-up, then constant / linear / cosine / WSD."""
    step = args.global_batch_size
    wsd = args.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * step,
        lr_decay_steps=args.lr_decay_iters * step,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters * step,
        wd_incr_style="constant",
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        wsd_decay_steps=None if wsd is None else wsd * step,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the next step."""
    return float(next(g["lr"] for g in optimizer.param_groups if g.get("default_config", True)))


def step(optimizer: MegatronOptimizer) -> tuple[bool, float | None]:
    """One optimizer step.

    Returns:
        Whether it was taken (a loss scaler may skip it), and the gradient norm before clipping, None without clipping.
    """
    taken, grad_norm, _ = optimizer.step()
    return bool(taken), None if grad_norm is None else float(grad_norm)
