// SPDX-License-Identifier: Apache-2.0
#include "op_kernel/ternary_rows_bf16.cpp"
#include "op_kernel/ternary_rows_fp16.cpp"
#include "op_kernel/ternary_rows_fp32.cpp"
