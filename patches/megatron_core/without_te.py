# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core's layers, which need neither Transformer Engine nor Apex with them."""

import functools
import inspect
from collections.abc import Callable

import torch

from .. import logger, replace


def allow_sequence_parallel_torch_norm() -> None:
    """Lets torch's RMSNorm / LayerNorm run under sequence parallelism.

    Displaces ``megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__``, which asserts that sequence parallelism
    is off, so that neither Apex nor Transformer Engine can be done without. What is missing there is only the mark
    ``sequence_parallel`` on the parameters: ``finalize_model_grads`` sums the gradients of marked parameters over the
    tensor-parallel group, and without it every rank would train its own norm weights on its own part of the sequence.
    """
    from megatron.core.transformer import torch_norm

    def marked(original: Callable) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def __new__(cls: type, *args, **kwargs) -> torch.nn.Module:  # noqa: N807
            config = signature.bind(cls, *args, **kwargs).arguments["config"]
            wanted, config.sequence_parallel = config.sequence_parallel, False
            try:
                norm = original(cls, *args, **kwargs)
            finally:
                config.sequence_parallel = wanted
            for parameter in norm.parameters():
                parameter.sequence_parallel = wanted
            return norm

        return __new__

    replace(torch_norm.WrappedTorchNorm, "__new__", marked)


def allow_moe_router_without_te() -> None:
    """Lets the router of a mixture of experts compute where Transformer Engine is absent.

    Sets ``megatron.core.transformer.moe.moe_utils.te_general_gemm`` to None where it is undefined. The router asks for
    "is not None" before it falls back to ``torch.mm``, and without Transformer Engine the name does not even exist
    (NameError). 0.12.1 does not know the name, and does not need it.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "RouterGatingLinearFunction") and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        logger.info("patched megatron.core.transformer.moe.moe_utils.te_general_gemm")
