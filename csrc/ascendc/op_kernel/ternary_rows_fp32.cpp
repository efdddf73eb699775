// SPDX-License-Identifier: Apache-2.0
// The toolkit takes one kernel per file.
#include "ternary_rows.h"

extern "C" __global__ __aicore__ void ternary_rows_fp32(GM_ADDR table)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    ternary::RunRows<float>(table);
}
