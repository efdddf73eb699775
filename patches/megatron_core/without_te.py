# SPDX-License-Identifier: Apache-2.0
"""Patches that let megatron-core train without Transformer Engine and Apex; with them its behavior is unchanged."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from .. import logger, replace


def install() -> None:
    """Applies all patches of this module."""
    replace("megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", _marked_norm)
    replace("megatron.core.optimizer.distrib_optimizer.quantize_param_shard", _unless_empty, missing_ok=True)
    _provide_fused_adam()
    _let_moe_router_compute()


def _marked_norm(original: Callable, *args, **kwargs) -> torch.nn.Module:
    """Lets torch's RMSNorm / LayerNorm run under sequence parallelism.

    Displaces ``megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__``, which asserts that sequence parallelism
    is off, so that sequence parallelism requires Apex or Transformer Engine. All that is missing there is the mark
    ``sequence_parallel`` on the parameters: ``finalize_model_grads`` sums the gradients of marked parameters over the
    tensor-parallel group, and without it every rank would train its own norm weights on its own part of the sequence.
    """
    config = inspect.signature(original).bind(*args, **kwargs).arguments["config"]
    wanted, config.sequence_parallel = config.sequence_parallel, False
    try:
        norm = original(*args, **kwargs)
    finally:
        config.sequence_parallel = wanted
    for parameter in norm.parameters():
        parameter.sequence_parallel = wanted
    return norm


def _unless_empty(original: Callable, model_params: Sequence[torch.Tensor], *args, **kwargs) -> None:
    """Lets the distributed optimizer of megatron-core 0.12.1 take a step.

    Displaces ``megatron.core.optimizer.distrib_optimizer.quantize_param_shard``, which gets all fp8 parameters
    after each step and, without Transformer Engine, raises "Invalid Transformer Engine version" even if there are
    none. Like later versions, the replacement then returns at once; with fp8 parameters the original still raises.
    """
    if len(model_params) > 0:
        original(model_params, *args, **kwargs)


def _let_moe_router_compute() -> None:
    """Sets ``megatron.core.transformer.moe.moe_utils.te_general_gemm`` to None where it is undefined.

    The router of a mixture of experts checks the name for "is not None" before it falls back to ``torch.mm``, and
    without Transformer Engine the name does not even exist (NameError). 0.12.1 neither has nor needs the name.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "RouterGatingLinearFunction") and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        logger.info("patched megatron.core.transformer.moe.moe_utils.te_general_gemm")


def _provide_fused_adam() -> None:
    """Gives megatron-core an Apex-like Adam.

    Sets ``Adam`` in ``megatron.core.optimizer`` and in ``megatron.core.optimizer.distrib_optimizer``, and the flags
    there that say that an Apex-like Adam is used (``USING_PYTORCH_OPTIMIZER`` and ``USING_APEX_OPTIMIZER`` do not exist
    in 0.12.1). With torch's AdamW the distributed optimizer asserts on one common step count when it is saved, and
    cannot be loaded on a rank that holds no shard.
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


class FusedAdam(torch.optim.Optimizer):
    """Adam with the interface of Apex's ``FusedAdam``, on torch's own fused kernel.

    Its important difference from ``torch.optim.AdamW`` is that the step count is stored in ``param_groups`` instead of
    the per-parameter state; megatron-core's distributed optimizer saves and restores it there.

    Args:
        params, lr, betas, eps, weight_decay: the arguments that ``torch.optim.AdamW`` takes under these names.
        adam_w_mode: whether weight decay is decoupled (AdamW); otherwise it is L2 regularization.
        capturable: whether steps must work inside a CUDA graph; megatron-core 0.17 and newer pass it.

    Raises:
        ValueError: if ``capturable``, because every step makes new tensors of its step count and cannot be captured.
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
    def step(self) -> None:  # type: ignore[override]  # returns no loss, for it takes no closure
        """Updates every parameter that has a gradient, once."""
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
                # torch increments the step count itself, in these temporary tensors.
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
