# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core's optimizers: an Adam without Apex, and optimizer state that other rates can load."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from .. import logger, replace


class FusedAdam(torch.optim.Optimizer):
    """Adam with the interface of Apex's ``FusedAdam``, on torch's own fused kernel.

    The one difference from ``torch.optim.AdamW`` that matters: the step count lives in ``param_groups``, not in the
    per-parameter state, which is what megatron-core's distributed optimizer saves and restores.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: coefficient.
        adam_w_mode: decoupled weight decay (AdamW); otherwise L2 regularisation.
        capturable: whether steps must work inside a CUDA graph; megatron-core 0.17 and newer hand it over.

    Raises:
        ValueError: a step that can be captured is asked for, which this one cannot: it makes its step counts anew.
    """

    def __init__(
        self,
        params,  # noqa: ANN001 - torch.optim's ParamsT
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "optimizer_cuda_graph: the Adam that stands in for Apex's cannot be captured in a CUDA graph: "
                "switch it off, or install Transformer Engine or Apex"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # returns no loss, for it takes no closure
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdam takes no closure: compute the gradients before step()")
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if not params:
                continue
            beta1, beta2 = group["betas"]
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # torch counts the step up itself, in these throw-away tensors.
                [torch.full((), group["step"] - 1.0, device=p.device) for p in params],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def provide_fused_adam() -> None:
    """Gives megatron-core an Apex-like Adam where neither Apex nor Transformer Engine is installed.

    Sets ``Adam`` in ``megatron.core.optimizer`` and in ``megatron.core.optimizer.distrib_optimizer``, and the flags
    there that say an Apex-like Adam is used (``USING_PYTORCH_OPTIMIZER`` and ``USING_APEX_OPTIMIZER`` are absent in
    0.12.1). With torch's AdamW the distributed optimizer asserts on one common step count when it is saved, and cannot
    be loaded on a rank that holds no shard.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    if hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"):
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.USING_APEX_OPTIMIZER = True
    logger.info("patched megatron.core.optimizer.Adam")


def load_optimizer_under_other_rates() -> None:
    """Lets optimizer state be loaded by a run with another learning rate, as before megatron-core 0.19.

    Takes ``max_lr`` and ``min_lr`` out of ``param_group_identifier_keys`` in ``megatron.core.optimizer.optimizer`` and
    ``megatron.core.optimizer.distrib_optimizer``, by which a parameter group finds its saved one. With them a changed
    ``--lr`` ends in a KeyError before the scheduler is asked: neither ``--override-opt-param-scheduler`` nor
    ``--use-checkpoint-opt-param-scheduler`` can work, nor can a message name them. For our own loop alone, whose groups
    never differ by their rates. 0.12.1 has no such name: it takes the saved groups in their order.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        keys = getattr(module, "param_group_identifier_keys", ())
        structural = tuple(key for key in keys if key not in ("max_lr", "min_lr"))
        if structural != keys:
            module.param_group_identifier_keys = structural
            logger.info("patched %s.param_group_identifier_keys", module.__name__)


def allow_distributed_optimizer_without_te() -> None:
    """Lets the distributed optimizer of megatron-core 0.12.1 step where Transformer Engine is absent.

    Displaces ``megatron.core.optimizer.distrib_optimizer.quantize_param_shard``, which gets all fp8 parameters
    after each step and, without Transformer Engine, raises "Invalid Transformer Engine version" also when there are
    none. Later versions return at once, and so does this; with fp8 parameters the original still raises.
    """
    from megatron.core.optimizer import distrib_optimizer

    def unless_empty(original: Callable) -> Callable:
        @functools.wraps(original)
        def quantize_param_shard(model_params: Sequence[torch.Tensor], *args, **kwargs) -> None:
            if len(model_params) > 0:
                original(model_params, *args, **kwargs)

        return quantize_param_shard

    replace(distrib_optimizer, "quantize_param_shard", unless_empty)
