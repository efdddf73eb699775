// SPDX-License-Identifier: Apache-2.0
// The toolkit takes one kernel per file.
#include "ternary_tile.h"

extern "C" __global__ __aicore__ void ternary_tile_fp16(GM_ADDR table)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    ternary::RunTiles<half>(table);
}
