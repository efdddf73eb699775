# SPDX-License-Identifier: Apache-2.0
"""Lets megatron-core train on a machine without CUDA: over gloo, on CPU tensors.

The only place that knows CUDA is missing. megatron-core asks for CUDA by name in many places; what follows answers
those calls with the CPU's equivalent, one patch per kind of call, and touches nothing where CUDA is present.
"""

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from ..cli import Whole, from_environment
from . import replace
from .upstream_warnings import drop_records

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "tensor", "zeros")


def accelerator() -> bool:
    """Whether this machine has CUDA or an NPU."""
    if torch.cuda.is_available():
        return True
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu

    return torch_npu.npu.is_available()


def install() -> None:
    """Applies every patch that megatron-core needs.

    Raises:
        RuntimeError: CUDA is available, so that its calls must not be redirected.
    """
    _install_torch()
    random_state()


def install_for_megatron_lm() -> None:
    """The part of :func:`install` that imports no Megatron, and what Megatron-LM's own training loop needs beyond.

    To be called before a host's adaptor, which must see Megatron first; :func:`random_state` goes after it.

    Raises:
        RuntimeError: CUDA is available.
    """
    _install_torch()
    streams()
    memory()
    batch_invariant_kernels()
    no_compilation()
    pretend_cuda()


def _install_torch() -> None:
    # `with torch.device(...)` keeps a list of torch's factories from its first use on: it must be the originals, or
    # whoever builds a model on the meta device (Transformers does) gets uninitialised tensors.
    torch.utils._device._device_constructors()
    if torch.cuda.is_available():
        raise RuntimeError(
            "CUDA is available: the CPU patches would hide it. Set CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    current_device()
    factories()
    tensor_type()
    tensor_cuda()
    synchronize()
    current_stream()


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
    drop_records(random.__name__, "CPU RNG state changed within GPU RNG context")


def current_stream() -> None:
    """``torch.cuda.current_stream()`` -> a stream on which work is done at once.

    Without it gradients cannot be reduced with megatron-core 0.19, whose ``distributed/param_and_grad_buffer.py`` lets
    the current stream wait for weight gradients out of CUDA graphs, also where there are none (``start_grad_sync``).
    """
    replace(torch.cuda, "current_stream", lambda _: lambda device=None: _CpuStream())


def streams() -> None:
    """``torch.cuda.Stream``, ``stream``, ``Event`` -> such that do nothing; work is done at once.

    Megatron-LM 0.16.1 wraps its model in DDP on a side stream (``training/training.py`` ``get_model``), 0.12.1 its
    distributed data parallel with several buffers.
    """
    for name in ("Stream", "Event"):
        replace(torch.cuda, name, lambda _: type("CpuStream", (_CpuStream,), {}))
    replace(torch.cuda, "stream", lambda _: lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "set_device", lambda _: lambda device: None)


def memory() -> None:
    """``torch.cuda.memory_allocated`` and its like -> 0, ``empty_cache`` -> nothing; reports would fail without."""
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replace(torch.cuda, name, lambda _: lambda device=None: 0)
    replace(torch.cuda, "memory_stats", lambda _: lambda device=None: {"allocation.all.current": 0})
    replace(torch.cuda, "empty_cache", lambda _: lambda: None)
    replace(torch.cuda, "reset_peak_memory_stats", lambda _: lambda device=None: None)


def batch_invariant_kernels() -> None:
    """``megatron.core.transformer.custom_layers.batch_invariant_kernels`` -> a module that raises when it is used.

    ``megatron.training.initialize`` of 0.16.1 imports it for a flag that is off by default, and it imports triton,
    which a CPU build of torch does not bring along. A stand-in for triton itself would deceive everybody else.
    """
    name = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    if importlib.util.find_spec("triton") is not None or name in sys.modules:
        return
    module: Any = types.ModuleType(name)

    def enable_batch_invariant_mode(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("--batch-invariant-mode needs triton, which is not installed")

    module.enable_batch_invariant_mode = enable_batch_invariant_mode
    module.is_batch_invariant_mode_enabled = lambda: False
    sys.modules[name] = module


def no_compilation() -> None:
    """``torch.compile`` runs functions as they are.

    ``jit_fuser`` functions are warmed up at start-up (``training/initialize.py``) and inductor would ask for the name
    of the CUDA device that :func:`pretend_cuda` speaks of.
    """
    import torch._dynamo

    torch._dynamo.config.disable = True


def pretend_cuda() -> None:
    """``torch.cuda.is_available()`` -> True, ``device_count()`` -> processes on this node.

    ``megatron.training.initialize`` refuses to start without CUDA, and takes each process's device from the count.
    ``get_device_properties()`` gets an architecture, by which ``training/ternary_flags.py`` tells what it must check.
    Data loaders that take this for a GPU pin what they read, which needs a driver: ``Tensor.pin_memory()`` gives the
    tensor itself.
    """
    properties = types.SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0)
    replace(torch.Tensor, "pin_memory", lambda _: lambda self, *args, **kwargs: self)
    replace(torch.cuda, "get_device_properties", lambda _: lambda device=None: properties)
    replace(torch.cuda, "is_available", lambda _: lambda: True)
    replace(torch.cuda, "device_count", lambda _: lambda: from_environment("LOCAL_WORLD_SIZE", Whole(1), 1))


class _CpuStream:
    """A stream, or an event on one, whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""


def keep_sent_tensors() -> None:
    """Keeps a pipeline stage's output in memory until its backward pass, on the CPU.

    Displaces ``megatron.core.model_parallel_config.ModelParallelConfig.__post_init__`` to switch
    ``deallocate_pipeline_outputs`` off, which Megatron-LM switches on: gloo sends in the background, from memory that
    would be freed meanwhile (CUDA's streams keep the order), and interleaved stages then train on NaN.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig

    def keeping(original: Callable) -> Callable:
        @functools.wraps(original)
        def __post_init__(self: ModelParallelConfig) -> None:  # noqa: N807
            original(self)
            self.deallocate_pipeline_outputs = False

        return __post_init__

    replace(ModelParallelConfig, "__post_init__", keeping)
