// SPDX-License-Identifier: Apache-2.0
// The table of one launch, written by the host (tiling.cpp) and read by the kernels word by word.
// Layout: header, one cut per core and one more, then one entry per weight. This file has only plain constants, because
// both bisheng and g++ compile it.
// A cut is where a core begins and the core before it ends: a tile, and the weight that holds it.
#pragma once

#include <cstdint>

namespace ternary {

// A segment is what shares one scale: a group, or a whole row. A tile is what a core processes at a time.
enum HeaderWord : uint32_t {
    kWeights = 0,         // number of entries
    kPieceElements = 1,   // elements of a weight that pass through the vector unit at a time
    kInputBytes = 2,      // one buffer of the input queue
    kInputBuffers = 3,    // 2 if loading may overlap with computing
    kPartials = 4,        // fp32 partial sums
    kMaxSegments = 5,     // most segments in a tile
    kLaunchFlags = 6,     // union of the entries' flags: which buffers exist
    kThresholds = 7,      // number of thresholds of the space; 0 for ternary, whose levels are not read from here
    kUpperTies = 8,       // bit k: a weight exactly on threshold k takes the level above it
    kThreshold = 9,       // fp32 bits of each, ascending, in units of the scale
    kLevel = 13,          // fp32 bits of each level, of which there is one more
    kHeaderWords = 18,
};

enum CutWord : uint32_t {
    kCutTile = 0,
    kCutWeight = 1,
    kCutWords = 2,
};

// Addresses and 64-bit counts take two words, low word first.
enum EntryWord : uint32_t {
    kInput = 0,
    kOutput = 2,
    kScales = 4,
    kPacked = 6,
    kPrevious = 8,
    kStatistics = 10,
    kFirstTile = 12,        // tiles are numbered through the whole launch
    kTiles = 13,
    kFlags = 14,
    kSegment = 15,          // elements per scale
    kLineLength = 16,       // a line is a stretch that tiles must not cross: the matrix, or a row if packing needs it
    kLinePackedBytes = 17,
    kTilesPerLine = 18,
    kTileSegments = 19,     // segments per tile, except for the last tile of a line
    kEpsilon = 20,          // bits of the fp32 lower bound of a scale
    kReciprocal = 21,       // bits of 1 / kSegment if that is exact (a power of two), else 0
    kMultiplier = 22,       // bits of the fp32 multiplier of the statistic
    kEntryWords = 23,
};

enum Flag : uint32_t {
    kGivenScales = 1,   // read the scales instead of computing and writing them
    kPack = 2,          // write 2-bit codes
    kCount = 4,         // count non-zero codes
    kCompare = 8,       // count codes that differ from packed ones
    kUnpack = 16,       // read packed codes and scales, write the weight
    kResident = 32,     // a row stays in UB between summing and quantizing
    kAbsmax = 64,       // scales are computed from the largest magnitude instead of the mean
    kLevels = 128,      // the space is that of the header instead of ternary
};
constexpr uint32_t kCodes = kPack | kCount | kCompare | kUnpack;   // the operations that support only ternary codes

constexpr uint32_t kPackedBlock = 128;                        // elements that become
constexpr uint32_t kPackedBlockBytes = 32;                    // bytes
constexpr uint32_t kStatisticsLanes = 64;                     // int32 partial counts per core and kind
constexpr uint32_t kStatisticsWords = 2 * kStatisticsLanes;   // non-zero codes, changed codes
constexpr uint32_t kAcrossLimit = 512;                        // longest segments that are processed side by side

constexpr uint32_t kUnifiedBufferBytes = 192 * 1024 - 8 * 1024 - 256;   // what the toolchain leaves of UB
constexpr uint32_t kMaxRepeats = 255;
constexpr uint32_t kMostThresholds = kLevel - kThreshold;
static_assert(kHeaderWords - kLevel == kMostThresholds + 1, "one level more than thresholds");

}  // namespace ternary
