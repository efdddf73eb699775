# SPDX-License-Identifier: Apache-2.0
"""The C kernels, compiled for this machine; torch's operations if they cannot be compiled or fail their self-test."""

import ctypes
import functools
from pathlib import Path

import torch

from ...ops.cpu.library import build, threads_for
from ...quantization import pack
from . import reference
from .reference import MOST_TOKENS, PackedKernels

_SOURCES = (Path(__file__).with_name("packed_linear.c"), Path(__file__).parents[2] / "ops" / "cpu" / "bits.h")
_PAIR, _FIELDS, _TOKENS = 256, 8, 4  # The C source calls them PAIR, 2 * FIELDS and TOKENS.
# Products of bf16 numbers are exact in fp32, so that a fused multiply-add rounds like a product and a sum.
_FLAGS = ("-ffp-contract=fast",)
_POINTER, _LONG, _INTEGER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "bitcpm_packed_product": (*[_POINTER] * 6, _LONG, _LONG, _LONG, _INTEGER, _INTEGER, _INTEGER),
    "bitcpm_unpack_rows": (*[_POINTER] * 3, _LONG, _LONG, _LONG, _INTEGER, _INTEGER),
}


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """Returns the compiled library, or None and the reason why there is none."""
    return build("packed_linear", _SOURCES, _SIGNATURES, _FLAGS)


def kernels() -> PackedKernels:
    """Returns the C kernels, or torch's operations and a line in the log if there is no compiler or a test fails."""
    library, why = load()
    if library is None:
        return reference.fallback("cpu", str(why), "install a C compiler (apt-get install gcc), or name one by CC")
    made = PackedKernels("cpu", functools.partial(_decode, library), functools.partial(_multiply, library))
    wrong = self_test(made)
    if wrong is not None:
        return reference.fallback("cpu", f"the compiled kernel is wrong ({wrong})", "name another compiler by CC")
    return made


def self_test(made: PackedKernels) -> str | None:
    """Compares kernels with torch on small integer weights, whose sums are exact; returns what is wrong, or None."""
    assert made.multiply is not None
    for rows, columns, groups in ((5, 200, 1), (3, 384, 4), (2, 640, 5)):
        codes = (torch.arange(rows * columns).view(rows, columns) * 7 // 3 % 3 - 1).to(torch.int8)
        scales = 2.0 ** (torch.arange(rows * groups).view(rows, groups) % 5).to(torch.bfloat16)
        packed, group_size = pack(codes), -1 if groups == 1 else columns // groups
        for dtype in (torch.bfloat16, torch.float32):
            weight = reference.decode(packed, scales, columns, group_size, dtype)
            if not torch.equal(made.decode(packed, scales, columns, group_size, dtype), weight):
                return f"decoding {rows} x {columns}, {groups} groups, {dtype}"
            for tokens in (1, 7):
                x = (torch.arange(tokens * columns).view(tokens, columns) * 5 % 9 - 4).to(dtype)
                if not torch.equal(made.multiply(x, packed, scales), (x.double() @ weight.double().t()).to(dtype)):
                    return f"{tokens} tokens times {rows} x {columns}, {groups} groups, {dtype}"
    return None


def _decode(
    library: ctypes.CDLL,
    packed: torch.Tensor,
    scales: torch.Tensor,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight = torch.empty(packed.shape[0], columns, dtype=dtype, device="cpu")
    library.bitcpm_unpack_rows(
        packed.data_ptr(),
        scales.data_ptr(),
        weight.data_ptr(),
        packed.shape[0],
        columns,
        scales.shape[1],
        _is_bf16(dtype),
        threads_for(packed.shape[0], weight.numel()),
    )
    return weight


def _multiply(library: ctypes.CDLL, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    (tokens, columns), rows = x.shape, packed.shape[0]
    if not 0 < tokens <= MOST_TOKENS:
        raise ValueError(f"{tokens} tokens: the kernel multiplies from 1 to {MOST_TOKENS}")
    pairs = -(-columns // _PAIR)
    y = torch.empty(tokens, rows, dtype=x.dtype, device="cpu")
    arranged = torch.empty(-(-tokens // _TOKENS) * _TOKENS, pairs * _PAIR, dtype=torch.float32, device="cpu")
    group_of = torch.empty(pairs * _FIELDS, dtype=torch.int32, device="cpu")
    library.bitcpm_packed_product(
        x.data_ptr(),
        packed.data_ptr(),
        scales.data_ptr(),
        y.data_ptr(),
        arranged.data_ptr(),
        group_of.data_ptr(),
        rows,
        columns,
        scales.shape[1],
        tokens,
        _is_bf16(x.dtype),
        threads_for(rows, rows * columns),
    )
    return y


def _is_bf16(dtype: torch.dtype) -> bool:
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"{dtype}: the kernel knows bfloat16 and float32")
    return dtype == torch.bfloat16
