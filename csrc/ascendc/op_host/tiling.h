// SPDX-License-Identifier: Apache-2.0
// The plan of which kernel processes which part of which weight; plain C++ that needs no device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "table.h"

namespace ternary {

enum class Dtype : uint32_t { BF16 = 0, FP16 = 1, FP32 = 2 };

// The work on one weight [rows, columns]. Addresses are those of the device; 0 means "not wanted".
struct WeightSpec {
    uint64_t input;        // latent weight; unused with `unpack`
    uint64_t output;       // quantized weight
    uint64_t scales;       // bf16 [rows, columns / group]: written, or read with `givenScales` and `unpack`
    uint64_t packed;       // 2-bit codes, written
    uint64_t previous;     // 2-bit codes, read: to compare with, or to unpack
    uint64_t statistics;   // int32 [cores, kStatisticsWords], zero before the launch
    uint32_t rows;
    uint32_t columns;
    uint32_t group;        // elements per scale; divides the row
    float epsilon;
    float multiplier;      // factor of the statistic
    uint32_t absmax;       // whether the statistic is the largest magnitude, else the mean
    uint32_t givenScales;
    uint32_t unpack;
};

// The quantization space of all weights, in units of the scale, with the values of
// bitcpm_megatron/quantization/spaces.py.
struct Space {
    uint32_t thresholds;               // number of thresholds; 0 for ternary, which needs no table
    uint32_t upperTies;                // bit k: a weight exactly on threshold k takes the level above it
    float threshold[kMostThresholds];  // ascending
    float level[kMostThresholds + 1];  // ascending, one more than thresholds
};

enum class Kernel : uint32_t { Tile = 0, Rows = 1 };

struct Launch {
    Kernel kernel;
    uint32_t blocks;                 // cores
    uint32_t unifiedBufferBytes;
    std::vector<uint32_t> table;     // table for the device, see table.h
};

struct Plan {
    std::vector<Launch> launches;    // at most one per kernel
    std::string error;               // if not empty, the reason why nothing can be launched
};

// Returns the launches of one step over all weights of a dtype.
Plan MakePlan(const std::vector<WeightSpec>& weights, const Space& space, Dtype dtype, uint32_t cores);

// Returns the number of bytes of the packed codes of a weight.
uint64_t PackedBytes(uint64_t rows, uint64_t columns);

}  // namespace ternary
