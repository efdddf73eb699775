// SPDX-License-Identifier: Apache-2.0
// The C interface of the emulated kernels, for ctypes.
#pragma once

#include <cstdint>

#include "op_host/tiling.h"

extern "C" {

// The counters of emulation::Counters, and the number of launches.
struct EmulatedCounters {
    uint64_t readBytes;
    uint64_t writtenBytes;
    uint64_t tableBytes;
    uint64_t dmas;
    uint64_t vectorInstructions;
    uint64_t vectorRepeats;
    uint64_t barriers;
    uint64_t unifiedBufferBytes;
    uint64_t launches;
};

// Plans and runs all weights. Returns 0, or 1 with the reason in `error`: "[check] text" if the kernel misbehaved,
// "[plan] text" if the tiling refused.
int32_t ternary_emulate(const ternary::WeightSpec* weights, uint32_t count, const ternary::Space* space, uint32_t dtype,
                        uint32_t cores, uint32_t late, EmulatedCounters* counters, char* error, uint32_t errorBytes);

// Runs one launch from its table only, as a device does. `kernel` is a ternary::Kernel, `dtype` a ternary::Dtype.
// Returns the same as ternary_emulate, but writes no counters.
int32_t ternary_emulate_table(uint32_t kernel, uint32_t dtype, uint32_t blocks, const uint32_t* table, char* error,
                              uint32_t errorBytes);

// Writes the plan as numbers: the number of launches, then kernel, blocks, UB bytes, table words and the table of each.
// Writes at most `capacity` numbers and returns how many there are, or -1 with the reason in `error`.
int64_t ternary_plan(const ternary::WeightSpec* weights, uint32_t count, const ternary::Space* space, uint32_t dtype,
                     uint32_t cores, int64_t* numbers, int64_t capacity, char* error, uint32_t errorBytes);
}
