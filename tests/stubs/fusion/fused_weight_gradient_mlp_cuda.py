# SPDX-License-Identifier: Apache-2.0
"""A CPU stand-in for Apex's extension of this name: it proves the plumbing of the fusion, not the CUDA kernel."""

import torch


def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """``main_grad += grad_output^T total_input`` in the dtype of ``main_grad``."""
    main_grad.add_(grad_output.t().to(main_grad.dtype) @ total_input.to(main_grad.dtype))


def wgrad_gemm_accum_fp16(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """The same for half-precision main gradients."""
    wgrad_gemm_accum_fp32(total_input, grad_output, main_grad)
