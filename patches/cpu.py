# SPDX-License-Identifier: Apache-2.0
"""Lets megatron-core train on a machine without CUDA: over gloo, on CPU tensors.

The only place that knows CUDA is missing. megatron-core asks for CUDA by name in many places; what follows answers
those calls with the CPU's equivalent, one patch per kind of call, and touches nothing where CUDA is present.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from . import replace

_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")
_RNG_WARNING = "CPU RNG state changed within GPU RNG context"


def install() -> None:
    """Applies every patch of this module.

    Raises:
        RuntimeError: CUDA is available, so that its calls must not be redirected.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "CUDA is available: the CPU patches would hide it. Set CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    current_device()
    factories()
    tensor_type()
    tensor_cuda()
    synchronize()
    random_state()


def current_device() -> None:
    """``torch.cuda.current_device()`` -> ``torch.device("cpu")``.

    Without it every parameter, buffer and communication tensor of megatron-core fails to allocate
    ("Torch not compiled with CUDA enabled", first at ``tensor_parallel/layers.py``).
    """
    replace(torch.cuda, "current_device", lambda _: lambda: torch.device("cpu"))


def factories() -> None:
    """``device="cuda"`` in torch's factory functions -> ``"cpu"``.

    Without it the schedules fail at their token counter (``pipeline_parallel/schedules.py``), gradient clipping at its
    overflow buffer (``optimizer/clip_grads.py``) and attention at its causal mask (``transformer/utils.py``).
    """

    def on_cpu(original: Callable) -> Callable:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return original(*args, **kwargs)

        return factory

    for name in _FACTORIES:
        replace(torch, name, on_cpu)


def tensor_type() -> None:
    """``Tensor.type()`` of a CPU tensor -> ``"torch.cuda.<Dtype>Tensor"``.

    megatron-core recognises dtypes by these strings: without it gradient clipping asserts (``optimizer/clip_grads.py``)
    and both mixed-precision optimizers raise on every parameter (``optimizer/optimizer.py``, ``distrib_optimizer.py``).
    """

    def as_cuda(original: Callable) -> Callable:
        @functools.wraps(original)
        def tensor_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
            if dtype is not None:
                return original(self, dtype, **kwargs)
            return original(self).replace("torch.", "torch.cuda.", 1)

        return tensor_type

    replace(torch.Tensor, "type", as_cuda)


def tensor_cuda() -> None:
    """``Tensor.cuda()`` -> the tensor itself.

    Without it optimizer state cannot be restored (``optimizer/optimizer.py``, ``distrib_optimizer.py``).
    """
    replace(torch.Tensor, "cuda", lambda _: lambda self, *args, **kwargs: self)


def synchronize() -> None:
    """``torch.cuda.synchronize()`` -> nothing.

    Without it pipeline stages fail at their first exchange (``pipeline_parallel/p2p_communication.py``).
    """
    replace(torch.cuda, "synchronize", lambda _: lambda device=None: None)


def random_state() -> None:
    """The CUDA random number generator -> the CPU's.

    Covers ``torch.cuda.get_rng_state``, ``set_rng_state``, ``manual_seed`` and megatron-core's ``_set_cuda_rng_state``
    (``tensor_parallel/random.py``). Without it seeding fails; without the last one the state would be queued until CUDA
    comes up, which it never does, and tensor-parallel ranks would silently initialise their shards alike.
    """
    from megatron.core.tensor_parallel import random

    replace(torch.cuda, "get_rng_state", lambda _: lambda device="cuda": torch.get_rng_state())
    replace(torch.cuda, "set_rng_state", lambda _: lambda new_state, device="cuda": torch.set_rng_state(new_state))
    replace(torch.cuda, "manual_seed", lambda _: lambda seed: torch.manual_seed(seed) and None)
    replace(
        random,
        "_get_cuda_rng_state",
        lambda _: lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
    )
    replace(
        random,
        "_set_cuda_rng_state",
        lambda _: lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
    )
    # Here the "GPU" generator is the CPU's, so that every fork of it would warn of what it is meant to do.
    logger = logging.getLogger(random.__name__)
    if not any(isinstance(f, _DropForkWarning) for f in logger.filters):
        logger.addFilter(_DropForkWarning())


class _DropForkWarning(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _RNG_WARNING not in record.getMessage()
