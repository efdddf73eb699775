// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <cstdio>

#include "kernel_operator.h"

extern "C" {
void ternary_tile_bf16(GM_ADDR table);
void ternary_tile_fp16(GM_ADDR table);
void ternary_tile_fp32(GM_ADDR table);
void ternary_rows_bf16(GM_ADDR table);
void ternary_rows_fp16(GM_ADDR table);
void ternary_rows_fp32(GM_ADDR table);
}

namespace {

using emulation::Machine;
using ternary::WeightSpec;

using Entry = void (*)(GM_ADDR);
constexpr Entry kEntries[2][3] = {{ternary_tile_bf16, ternary_tile_fp16, ternary_tile_fp32},
                                  {ternary_rows_bf16, ternary_rows_fp16, ternary_rows_fp32}};

void Explain(const std::string& text, char* error, uint32_t errorBytes)
{
    std::snprintf(error, errorBytes, "%s", text.c_str());
}

void AddRegion(uint64_t address, uint64_t bytes, bool writable)
{
    if (address != 0) {
        const std::vector<uint16_t> nobody(writable ? bytes : 0);
        Machine::Get().regions.push_back({static_cast<uintptr_t>(address), bytes, writable, nobody, nobody});
    }
}

// Adds exactly the memory that a weight's launch may read and write.
void AddRegions(const WeightSpec& w, uint32_t elementBytes, uint32_t cores)
{
    const uint64_t elements = static_cast<uint64_t>(w.rows) * w.columns;
    const bool readsScales = w.givenScales || w.unpack;
    AddRegion(w.unpack || w.input == w.output ? 0 : w.input, elements * elementBytes, false);
    AddRegion(w.output, elements * elementBytes, true);
    AddRegion(w.scales, elements / w.group * 2, !readsScales);
    AddRegion(w.packed, ternary::PackedBytes(w.rows, w.columns), true);
    AddRegion(w.previous, ternary::PackedBytes(w.rows, w.columns), false);
    AddRegion(w.statistics, static_cast<uint64_t>(cores) * ternary::kStatisticsWords * sizeof(int32_t), true);
}

void RunLaunch(uint32_t kernel, uint32_t dtype, uint32_t blocks, const uint32_t* words, std::size_t count)
{
    Machine& machine = Machine::Get();
    machine.cores = blocks;
    std::vector<uint32_t> table(words, words + count);
    const std::size_t regions = machine.regions.size();
    AddRegion(reinterpret_cast<uint64_t>(table.data()), table.size() * sizeof(uint32_t), false);
    for (uint32_t core = 0; core < blocks; ++core) {
        machine.StartCore(core);
        kEntries[kernel][dtype](reinterpret_cast<GM_ADDR>(table.data()));
        machine.FinishCore();
    }
    machine.regions.resize(regions);
}

void Reset(emulation::Timing timing)
{
    Machine& machine = Machine::Get();
    machine.timing = timing;
    machine.counters = {};
    machine.deferredError.clear();
    machine.regions.clear();
}

// Adds the regions of a weight from its entry in a table.
void AddRegions(const uint32_t* entry, uint32_t elementBytes, uint32_t blocks)
{
    auto address = [entry](uint32_t word) { return static_cast<uint64_t>(entry[word + 1]) << 32 | entry[word]; };
    const uint32_t flags = entry[ternary::kFlags];
    const uint64_t lines = entry[ternary::kTiles] / entry[ternary::kTilesPerLine];
    const uint64_t elements = lines * entry[ternary::kLineLength];
    const uint64_t packedBytes = lines * entry[ternary::kLinePackedBytes];
    const bool inPlace = address(ternary::kInput) == address(ternary::kOutput);
    AddRegion(inPlace ? 0 : address(ternary::kInput), elements * elementBytes, false);
    AddRegion(address(ternary::kOutput), elements * elementBytes, true);
    AddRegion(address(ternary::kScales), elements / entry[ternary::kSegment] * 2,
              (flags & (ternary::kGivenScales | ternary::kUnpack)) == 0);
    AddRegion(address(ternary::kPacked), packedBytes, true);
    AddRegion(address(ternary::kPrevious), packedBytes, false);
    AddRegion(address(ternary::kStatistics), blocks * ternary::kStatisticsWords * sizeof(int32_t), true);
}

}  // namespace

int32_t ternary_emulate(const WeightSpec* weights, uint32_t count, const ternary::Space* space, uint32_t dtype,
                        uint32_t cores, uint32_t late, EmulatedCounters* counters, char* error, uint32_t errorBytes)
{
    const ternary::Plan plan =
        ternary::MakePlan({weights, weights + count}, *space, static_cast<ternary::Dtype>(dtype), cores);
    if (!plan.error.empty()) {
        Explain("[plan] " + plan.error, error, errorBytes);
        return 1;
    }
    Machine& machine = Machine::Get();
    Reset(late ? emulation::Timing::Late : emulation::Timing::Eager);
    for (uint32_t i = 0; i < count; ++i) {
        AddRegions(weights[i], dtype == 2 ? 4 : 2, cores);
    }
    try {
        for (const ternary::Launch& launch : plan.launches) {
            RunLaunch(static_cast<uint32_t>(launch.kernel), dtype, launch.blocks, launch.table.data(),
                      launch.table.size());
            if (machine.counters.unifiedBufferBytes > launch.unifiedBufferBytes && plan.launches.size() == 1) {
                throw emulation::Error{"[ub-capacity] the kernel allocates more than the tiling planned"};
            }
        }
    } catch (const emulation::Error& failure) {
        Explain(failure.text, error, errorBytes);
        machine.deferredError.clear();
        return 1;
    }
    const emulation::Counters& c = machine.counters;
    *counters = {c.readBytes, c.writtenBytes, c.tableBytes, c.dmas, c.vectorInstructions, c.vectorRepeats, c.barriers,
                 c.unifiedBufferBytes, plan.launches.size()};
    return 0;
}

int32_t ternary_emulate_table(uint32_t kernel, uint32_t dtype, uint32_t blocks, const uint32_t* table, char* error,
                              uint32_t errorBytes)
{
    Reset(emulation::Timing::Late);
    const uint32_t entries = ternary::kHeaderWords + (blocks + 1) * ternary::kCutWords;
    const uint32_t weights = table[ternary::kWeights];
    for (uint32_t i = 0; i < weights; ++i) {
        AddRegions(table + entries + i * ternary::kEntryWords, dtype == 2 ? 4 : 2, blocks);
    }
    try {
        RunLaunch(kernel, dtype, blocks, table, entries + weights * ternary::kEntryWords);
    } catch (const emulation::Error& failure) {
        Explain(failure.text, error, errorBytes);
        Machine::Get().deferredError.clear();
        return 1;
    }
    return 0;
}

int64_t ternary_plan(const WeightSpec* weights, uint32_t count, const ternary::Space* space, uint32_t dtype,
                     uint32_t cores, int64_t* numbers, int64_t capacity, char* error, uint32_t errorBytes)
{
    const ternary::Plan plan =
        ternary::MakePlan({weights, weights + count}, *space, static_cast<ternary::Dtype>(dtype), cores);
    if (!plan.error.empty()) {
        Explain(plan.error, error, errorBytes);
        return -1;
    }
    std::vector<int64_t> all = {static_cast<int64_t>(plan.launches.size())};
    for (const ternary::Launch& launch : plan.launches) {
        all.insert(all.end(), {static_cast<int64_t>(launch.kernel), launch.blocks, launch.unifiedBufferBytes,
                               static_cast<int64_t>(launch.table.size())});
        all.insert(all.end(), launch.table.begin(), launch.table.end());
    }
    std::copy_n(all.begin(), std::min<int64_t>(capacity, all.size()), numbers);
    return static_cast<int64_t>(all.size());
}
