# SPDX-License-Identifier: Apache-2.0
"""``torch_npu.npu_quant_matmul`` of int8 on an Atlas A2, as documented; what is not allowed raises an error."""

import torch

_LONGEST = 65535


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes ``x1 x2 * scale * pertoken_scale`` of int8 matrices, with exact integer sums.

    The product ``x1 x2`` has the shape ``[m, n]``; ``scale`` belongs to its columns, ``pertoken_scale`` to its rows.

    Args:
        x1: the first matrix, int8 ``[m, k]``, contiguous.
        x2: the second matrix, int8 ``[k, n]``, contiguous or the transpose of a contiguous matrix.
        scale: the scales of columns, ``[1]`` or ``[n]``.
        offset: must be None: the operator takes an offset only for an int8 output.
        pertoken_scale: the scales of rows, float32 ``[m]``; must not be None.
        bias: must be None: a bias is not modeled.
        output_dtype: bfloat16, with a scale in float32 or bfloat16; or float16, with a scale in float32.
    """
    (m, k), (rows, n) = x1.shape, x2.shape
    wrong = {
        "x1": x1.dtype != torch.int8 or not x1.is_contiguous() or not 0 < k <= _LONGEST or not m,
        "x2": x2.dtype != torch.int8
        or not (x2.is_contiguous() or x2.t().is_contiguous())
        or rows != k
        or not 0 < n <= _LONGEST,
        "offset": offset is not None,
        "bias": bias is not None,
        "output_dtype": output_dtype not in (torch.bfloat16, torch.float16),
        "scale": scale.dim() != 1
        or scale.shape[0] not in (1, n)
        or scale.dtype not in (torch.float32, *((torch.bfloat16,) if output_dtype == torch.bfloat16 else ())),
        "pertoken_scale": pertoken_scale is None
        or pertoken_scale.dtype != torch.float32
        or pertoken_scale.shape != (m,),
    }
    if any(wrong.values()):
        raise RuntimeError(
            f"npu_quant_matmul takes no such {', '.join(name for name, is_wrong in wrong.items() if is_wrong)}"
        )
    sums = x1.long() @ x2.long()
    return (sums.float() * scale.float() * pertoken_scale.unsqueeze(-1)).to(output_dtype)
