# SPDX-License-Identifier: Apache-2.0
"""A strict CPU stand-in for ``torch_npu``, with what MindSpeed 26.1.0_core_r0.12.1 needs to train small models.

It tests how operators are called, not an NPU. Whatever is not modeled here raises an error that names it. Modeled
operators compute what their documentation says, with plain torch operations. ``device="npu"`` is the CPU.
"""

import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.utils._device
import torch.utils.cpp_extension

__version__ = "2.7.1.stand-in"

# The dtypes that the device does not support; the CPU supports all.
unsupported_dtype: tuple[torch.dtype, ...] = ()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu.{name}")


def npu_rms_norm(
    input: torch.Tensor,
    gamma: torch.Tensor,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes RMSNorm over the last axis in fp32; returns the normalized input and the reciprocal root."""
    rstd = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Computes ``silu(first half) * second half`` along an axis."""
    gate, up = input.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("npu"):
            kwargs["device"] = "cpu"
        # Pinned memory would need an accelerator.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


torch.utils._device._device_constructors()  # caches the originals; `with torch.device(...)` would bypass wrappers
for _name in ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"):
    setattr(torch, _name, _on_cpu(getattr(torch, _name)))


def _to_npu(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False) -> torch.Tensor:
    return tensor


torch.Tensor.npu = _to_npu


def _with_lists(all_to_all: Callable) -> Callable:
    @functools.wraps(all_to_all)
    def all_to_all_single(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(a.tolist() if torch.is_tensor(a) else a for a in args)
        kwargs = {name: a.tolist() if torch.is_tensor(a) else a for name, a in kwargs.items()}
        return all_to_all(output, input, *args, **kwargs)

    return all_to_all_single


# Megatron-LM 0.12.1 passes the sizes as tensors, which the torch version that it was written for accepts and newer
# versions do not.
torch.distributed.all_to_all_single = _with_lists(torch.distributed.all_to_all_single)

# MindSpeed compiles its own operators against CANN when they are first used, and looks for CANN in these directories.
for _variable in ("ASCEND_HOME_PATH", "ATB_HOME_PATH"):
    os.environ.setdefault(_variable, str(Path(__file__).parent))


def npu_matmul_add_fp32(grad_output: torch.Tensor, total_input: torch.Tensor, grad: torch.Tensor) -> None:
    """Computes ``grad += grad_output^T total_input``, like MindSpeed's operator of this name."""
    grad.add_(grad_output.t().to(grad.dtype) @ total_input.to(grad.dtype))


def npu_rotary_position_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: int = 0) -> torch.Tensor:
    """Rotates the two halves of the last axis like MindSpeed's operator; refuses what its documentation excludes."""
    if mode != 0:
        raise NotImplementedError(f"the CPU stand-in for torch_npu rotates halves alone, not mode {mode}")
    if x.dim() != 4 or cos.dim() != 4 or cos.shape != sin.shape or not x.dtype == cos.dtype == sin.dtype:
        raise ValueError(f"npu_rotary_position_embedding: x {x.shape} {x.dtype}, cos {cos.shape} {cos.dtype}")
    # x is [S, B, N, D] (sequence, batch, heads, channels per head); cos and sin are [S, 1 or B, 1, D] or [S, B, N, D].
    # MindSpeed rotates no other layout.
    length, batch, heads, size = x.shape
    fits = [(length, 1, 1, size), (length, batch, 1, size), (length, batch, heads, size)]
    if tuple(cos.shape) not in fits or size % 2 or size >= 896 or batch >= 1000 or heads >= 1000:
        raise ValueError(f"npu_rotary_position_embedding: x {x.shape} SBND and cos {cos.shape} do not fit")
    if max(cos.abs().max(), sin.abs().max()) > 1 or not x.is_contiguous():
        raise ValueError("npu_rotary_position_embedding: cos and sin lie in [-1, 1], and x is contiguous")
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


_OPERATORS = (npu_matmul_add_fp32, npu_rotary_position_embedding)


def _load_operator(name: str, *args: Any, **kwargs: Any) -> types.SimpleNamespace:
    for operator in _OPERATORS:
        if operator.__name__ == name:
            return types.SimpleNamespace(**{name: operator})
    raise NotImplementedError(f"the CPU stand-in for torch_npu does not model MindSpeed's operator {name}")


torch.utils.cpp_extension.load = _load_operator

from . import _C, npu  # noqa: E402, F401 - as in the real one, torch.npu is there once this is imported
from .fusion_attention import npu_fusion_attention  # noqa: E402, F401
from .quant_matmul import npu_quant_matmul  # noqa: E402, F401

torch.npu = npu
sys.modules["torch.npu"] = npu
