# SPDX-License-Identifier: Apache-2.0
"""A CPU stand-in for Apex's extension of this name, which tests how the fusion is called, not the CUDA kernel."""

import torch


def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Computes ``main_grad += grad_output^T total_input`` in the dtype of ``main_grad``."""
    main_grad.add_(grad_output.t().to(main_grad.dtype) @ total_input.to(main_grad.dtype))


def wgrad_gemm_accum_fp16(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Computes the same as :func:`wgrad_gemm_accum_fp32`, for half-precision main gradients."""
    wgrad_gemm_accum_fp32(total_input, grad_output, main_grad)
