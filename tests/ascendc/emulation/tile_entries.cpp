// SPDX-License-Identifier: Apache-2.0
#include "op_kernel/ternary_tile_bf16.cpp"
#include "op_kernel/ternary_tile_fp16.cpp"
#include "op_kernel/ternary_tile_fp32.cpp"
