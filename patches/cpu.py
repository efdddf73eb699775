# SPDX-License-Identifier: Apache-2.0
"""Patches that let megatron-core train on a machine without CUDA, over gloo and on CPU tensors.

This is the only module that knows that CUDA is missing. megatron-core calls CUDA by name in many places. The tables
below answer those calls with the CPU's equivalent: each entry has the upstream symbol and the answer, and a comment
says what fails without it. Nothing is patched if CUDA is present.
"""

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

from ..cli import Whole, from_environment
from . import Replacement, replace
from .upstream_warnings import drop_records


class _CpuStream:
    """A stream, or an event on one, whose work is always done, so that there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self, *args: Any) -> None:
        """Returns at once."""

    wait = wait_event = wait_stream = record = synchronize


def _on_cpu(original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    if str(kwargs.get("device", "")).startswith("cuda"):
        kwargs["device"] = "cpu"
    return original(*args, **kwargs)


def _cuda_type(original: Callable, self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if dtype is not None:
        return original(self, dtype, **kwargs)
    return original(self).replace("torch.", "torch.cuda.", 1)


def _keep_sent_tensors(original: Callable, self: Any) -> None:
    original(self)
    self.deallocate_pipeline_outputs = False


_CORE: dict[str, Replacement] = {
    # Every parameter, buffer and communication tensor of megatron-core fails to allocate ("Torch not compiled with CUDA
    # enabled", first at tensor_parallel/layers.py).
    "torch.cuda.current_device": lambda _: torch.device("cpu"),
    # device="cuda" in torch's factories: the schedules fail at their token counter (pipeline_parallel/schedules.py),
    # gradient clipping at its overflow buffer (optimizer/clip_grads.py), attention at its causal mask
    # (transformer/utils.py).
    **dict.fromkeys(
        [f"torch.{name}" for name in "arange empty empty_like full ones rand tensor zeros".split()], _on_cpu
    ),
    # megatron-core recognizes dtypes by strings such as "torch.cuda.FloatTensor": gradient clipping asserts
    # (optimizer/clip_grads.py), and both mixed-precision optimizers raise on every parameter (optimizer/optimizer.py,
    # distrib_optimizer.py).
    "torch.Tensor.type": _cuda_type,
    # Optimizer state cannot be restored (optimizer/optimizer.py, distrib_optimizer.py).
    "torch.Tensor.cuda": lambda _, self, *args, **kwargs: self,
    # Pipeline stages fail at their first exchange (pipeline_parallel/p2p_communication.py).
    "torch.cuda.synchronize": lambda _, device=None: None,
    # Gradients cannot be reduced with megatron-core 0.19, whose distributed/param_and_grad_buffer.py lets the current
    # stream wait for weight gradients from CUDA graphs, even if there are none (start_grad_sync).
    "torch.cuda.current_stream": lambda _, device=None: _CpuStream(),
}

_MEGATRON_CORE: dict[str, Replacement] = {
    # Seeding fails.
    "torch.cuda.get_rng_state": lambda _, device="cuda": torch.get_rng_state(),
    "torch.cuda.set_rng_state": lambda _, new_state, device="cuda": torch.set_rng_state(new_state),
    "torch.cuda.manual_seed": lambda _, seed: torch.manual_seed(seed) and None,
    # The state would be queued until CUDA is initialized, which never happens, and tensor-parallel ranks would silently
    # initialize their shards alike.
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": (
        lambda _, device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    ),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": (
        lambda _, new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    ),
    # Megatron-LM lets pipeline stages free their output once its transfer has begun. CUDA's streams keep the order, but
    # gloo sends from that memory in the background, and interleaved stages then train on NaN.
    "megatron.core.model_parallel_config.ModelParallelConfig.__post_init__": _keep_sent_tensors,
}

# megatron.training.utils reads the architecture.
_PROPERTIES = types.SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0)
_TRAINING_LOOP: dict[str, Replacement] = {
    # Megatron-LM 0.16.1 wraps its model in DDP on a side stream (training/training.py get_model); in 0.12.1 distributed
    # data parallelism with several buffers uses one.
    "torch.cuda.Stream": _CpuStream,
    "torch.cuda.Event": _CpuStream,
    "torch.cuda.stream": lambda _, stream: contextlib.nullcontext(),
    "torch.cuda.set_device": lambda _, device: None,
    # Reports of memory usage fail.
    **dict.fromkeys(
        [f"torch.cuda.{which}memory_{what}" for which in ("", "max_") for what in ("allocated", "reserved")],
        lambda _, device=None: 0,
    ),
    "torch.cuda.memory_stats": lambda _, device=None: {"allocation.all.current": 0},
    "torch.cuda.empty_cache": lambda _: None,
    "torch.cuda.reset_peak_memory_stats": lambda _, device=None: None,
    # megatron.training.initialize refuses to start without CUDA, and chooses each process's device by the device count,
    # which is therefore the number of processes on this node.
    "torch.cuda.is_available": lambda _: True,
    "torch.cuda.device_count": lambda _: from_environment("LOCAL_WORLD_SIZE", Whole(1), 1),
    "torch.cuda.get_device_properties": lambda _, device=None: _PROPERTIES,
    # Data loaders take these answers for a GPU and pin the memory of what they read, which needs a driver.
    "torch.Tensor.pin_memory": lambda _, self, *args, **kwargs: self,
}


def accelerator() -> bool:
    """Returns whether this machine has CUDA or an NPU."""
    if torch.cuda.is_available():
        return True
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu

    return torch_npu.npu.is_available()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Returns a context for the import of megatron-core that does not load torch's compiler.

    From torch 2.2 on ``megatron.core.jit.jit_fuser`` is ``torch.compile``, and decorates some forty functions. As a
    decorator it imports dynamo and inductor, which takes about as long as importing torch, and no variable prevents it
    (``TORCH_COMPILE_DISABLE`` is read by dynamo). Inside the context ``torch.compile`` returns megatron-core's
    functions as they are; ``jit_fuser`` keeps doing so. Our loop calls only one of these functions, of the router of
    experts, which computes nothing without an expert bias. The context does nothing if megatron-core has been imported
    already, as in a host, or if there is CUDA or an NPU.
    """
    if torch.cuda.is_available() or {"torch_npu", "megatron.core"} & sys.modules.keys():
        yield
        return
    original = torch.compile
    torch.compile = functools.partial(_unless_of_megatron, original)
    try:
        yield
    finally:
        torch.compile = original


def _unless_of_megatron(original: Callable, model: Any = None, **options: Any) -> Any:
    if isinstance(model, types.FunctionType) and (model.__module__ or "").startswith("megatron."):
        return model
    return original(model, **options)


def install() -> None:
    """Applies every patch that megatron-core needs.

    Raises:
        RuntimeError: if CUDA is available, so that its calls must not be redirected.
    """
    _answer_for_cuda(_CORE)
    install_in_megatron_core()


def install_for_megatron_lm() -> None:
    """Applies the part of :func:`install` that imports no Megatron, and the patches for Megatron-LM's training loop.

    It must be called before a host's adaptor, which has to see Megatron first; :func:`install_in_megatron_core` is
    called after the adaptor.

    ``torch.compile`` is switched off: ``jit_fuser`` functions are warmed up at start-up (``training/initialize.py``),
    and inductor would ask for the name of the CUDA device that is simulated here.

    Raises:
        RuntimeError: if CUDA is available.
    """
    import torch._dynamo

    _answer_for_cuda({**_CORE, **_TRAINING_LOOP})
    _batch_invariant_kernels()
    torch._dynamo.config.disable = True


def _answer_for_cuda(answers: dict[str, Replacement]) -> None:
    # `with torch.device(...)` keeps a list of torch's factories from its first use on. It must hold the originals, or
    # code that builds a model on the meta device (as Transformers does) gets uninitialized tensors.
    torch.utils._device._device_constructors()
    if torch.cuda.is_available():
        raise RuntimeError(
            "CUDA is available: the CPU patches would hide it. Set CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    for symbol, answer in answers.items():
        replace(symbol, answer)


def install_in_megatron_core() -> None:
    """Applies the part of :func:`install` that imports megatron-core: random number generators and pipeline stages."""
    for symbol, answer in _MEGATRON_CORE.items():
        replace(symbol, answer)
    # The "GPU" generator is the CPU's here, so that every fork of it would warn about what it is meant to do.
    drop_records("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")


def _batch_invariant_kernels() -> None:
    """Replaces ``megatron.core.transformer.custom_layers.batch_invariant_kernels`` by a module that raises when used.

    ``megatron.training.initialize`` of 0.16.1 imports it for a flag that is off by default, and it imports triton,
    which a CPU build of torch does not include. A stand-in for triton itself would mislead all other packages.
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
