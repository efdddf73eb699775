# SPDX-License-Identifier: Apache-2.0
"""A strict CPU stand-in for ``torch_npu``: what MindSpeed 26.1.0_core_r0.12.1 needs to train small models.

It proves plumbing, not an NPU. Whatever is not modelled here raises and says what was asked for. Modelled operators
compute what their documentation says, with plain torch. ``device="npu"`` is the CPU.
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

# Dtypes that the device cannot hold: the CPU holds all.
unsupported_dtype: tuple[torch.dtype, ...] = ()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu.{name}")


def npu_rms_norm(
    input: torch.Tensor,  # noqa: A002 - the real one's name
    gamma: torch.Tensor,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last axis in fp32: the normalised input, and the reciprocal root."""
    rstd = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:  # noqa: A002 - the real one's name
    """``silu(first half) * second half`` along an axis."""
    gate, up = input.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2**31 - 1,
    next_tockens: int = 2**31 - 1,
    inner_precise: int = 0,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention over ``[sequence, batch, heads * size]`` (layout SBH), grouped heads included.

    Sparse mode 0 takes the mask as it is (True hides), 2 is causal whatever the mask, for sequences of one length.

    Returns:
        The result, and the softmax's maximum and sum ``[batch, heads, sequence, 8]``, alike along the last axis.
    """
    odd = {
        "input_layout": input_layout != "SBH",
        "pse": pse is not None,
        "padding_mask": padding_mask is not None,
        "keep_prob": keep_prob != 1.0,
        "sparse_mode": sparse_mode not in (0, 2),
        "actual_seq_qlen": actual_seq_qlen is not None or actual_seq_kvlen is not None,
        "next_tockens": sparse_mode == 0 and atten_mask is None and min(pre_tockens, next_tockens) < key.shape[0],
    }
    if any(odd.values()):
        names = ", ".join(name for name, is_odd in odd.items() if is_odd)
        raise NotImplementedError(f"the CPU stand-in for torch_npu does not model npu_fusion_attention with {names}")
    size = query.shape[-1] // head_num
    q, k, v = (t.reshape(*t.shape[:2], -1, size).permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(head_num // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    hidden = atten_mask
    if sparse_mode == 2:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1).to(v.dtype) @ v
    largest = scores.detach().amax(-1, keepdim=True)
    total = (scores.detach() - largest).exp().sum(-1, keepdim=True)
    return out.permute(2, 0, 1, 3).reshape(query.shape), largest.repeat(1, 1, 1, 8), total.repeat(1, 1, 1, 8)


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("npu"):
            kwargs["device"] = "cpu"
        # It would need an accelerator, to copy from.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


torch.utils._device._device_constructors()  # of the originals, or `with torch.device(...)` passes the wrappers by
for _name in ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"):
    setattr(torch, _name, _on_cpu(getattr(torch, _name)))


def _with_lists(all_to_all: Callable) -> Callable:
    @functools.wraps(all_to_all)
    def all_to_all_single(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
        args = tuple(a.tolist() if torch.is_tensor(a) else a for a in args)
        kwargs = {name: a.tolist() if torch.is_tensor(a) else a for name, a in kwargs.items()}
        return all_to_all(output, input, *args, **kwargs)

    return all_to_all_single


# Megatron-LM 0.12.1 passes the sizes as tensors, which the torch that it was written for takes, and newer ones do not.
torch.distributed.all_to_all_single = _with_lists(torch.distributed.all_to_all_single)

# MindSpeed compiles its own operators against CANN at first use.
for _variable in ("ASCEND_HOME_PATH", "ATB_HOME_PATH"):
    os.environ.setdefault(_variable, str(Path(__file__).parent))


def npu_matmul_add_fp32(grad_output: torch.Tensor, total_input: torch.Tensor, grad: torch.Tensor) -> None:
    """MindSpeed's: ``grad += grad_output^T total_input``."""
    grad.add_(grad_output.t().to(grad.dtype) @ total_input.to(grad.dtype))


def npu_rotary_position_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: int = 0) -> torch.Tensor:
    """MindSpeed's: rotation of the two halves of the last axis."""
    if mode != 0:
        raise NotImplementedError(f"the CPU stand-in for torch_npu rotates halves alone, not mode {mode}")
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
from .quant_matmul import npu_quant_matmul  # noqa: E402, F401

torch.npu = npu
sys.modules["torch.npu"] = npu
