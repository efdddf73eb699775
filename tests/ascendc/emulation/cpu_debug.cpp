// SPDX-License-Identifier: Apache-2.0
// Runs the kernels in the toolkit's own CPU-debug mode. `make kernel-cpu-debug` (tests/ascendc/cpu_debug.py) writes the
// cases that this program reads, and checks the results that it writes.
//
//     ternary_cpu_debug CASES RESULTS
//
// A case consists of 21 words (dtype, rows, columns, group, bits of eps, cores, wanted, given, bits of the multiplier,
// absmax, and the space as a ternary::Space), followed by the tensors that are given.
#include <tikicpulib.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "op_host/tiling.h"

#define DECLARE_KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR table)
DECLARE_KERNEL(ternary_tile_bf16);
DECLARE_KERNEL(ternary_tile_fp16);
DECLARE_KERNEL(ternary_tile_fp32);
DECLARE_KERNEL(ternary_rows_bf16);
DECLARE_KERNEL(ternary_rows_fp16);
DECLARE_KERNEL(ternary_rows_fp32);

namespace {

using ternary::Dtype;
using ternary::Kernel;

enum Tensor : uint32_t {
    kWeight = 1,
    kScaleTensor = 2,
    kPackedTensor = 4,
    kPreviousTensor = 8,
    kStatisticsTensor = 16,
};

struct Case {
    uint32_t dtype;
    uint32_t rows;
    uint32_t columns;
    uint32_t group;
    float epsilon;
    uint32_t cores;
    uint32_t wanted;   // the wanted results, as bits of Tensor
    uint32_t given;    // the given inputs, as bits of Tensor
    float multiplier;
    uint32_t absmax;
    ternary::Space space;
};

// A block of global memory that the kernels' processes share.
struct Memory {
    uint8_t* data = nullptr;
    uint64_t bytes = 0;

    void Allocate(uint64_t size)
    {
        bytes = size;
        data = static_cast<uint8_t*>(AscendC::GmAlloc(size));
        std::memset(data, 0, size);
    }
    bool Read(std::FILE* file, uint64_t size)
    {
        Allocate(size);
        return std::fread(data, 1, size, file) == size;
    }
    uint64_t Address() const { return reinterpret_cast<uint64_t>(data); }
    ~Memory()
    {
        if (data != nullptr) {
            AscendC::GmFree(data);
        }
    }
};

void Launch(const ternary::Launch& launch, Dtype dtype)
{
    Memory table;
    table.Allocate(launch.table.size() * sizeof(uint32_t));
    std::memcpy(table.data, launch.table.data(), table.bytes);
    const uint32_t blocks = launch.blocks;
    AscendC::SetKernelMode(KernelMode::AIV_MODE);
    if (launch.kernel == Kernel::Tile) {
        if (dtype == Dtype::BF16) {
            ICPU_RUN_KF(ternary_tile_bf16, blocks, table.data);
        } else if (dtype == Dtype::FP16) {
            ICPU_RUN_KF(ternary_tile_fp16, blocks, table.data);
        } else {
            ICPU_RUN_KF(ternary_tile_fp32, blocks, table.data);
        }
    } else {
        if (dtype == Dtype::BF16) {
            ICPU_RUN_KF(ternary_rows_bf16, blocks, table.data);
        } else if (dtype == Dtype::FP16) {
            ICPU_RUN_KF(ternary_rows_fp16, blocks, table.data);
        } else {
            ICPU_RUN_KF(ternary_rows_fp32, blocks, table.data);
        }
    }
}

bool Run(const Case& c, std::FILE* cases, std::FILE* results)
{
    const uint64_t elements = static_cast<uint64_t>(c.rows) * c.columns;
    const uint64_t scaleBytes = elements / c.group * 2;
    const uint64_t packedBytes = ternary::PackedBytes(c.rows, c.columns);
    const uint64_t weightBytes = elements * (c.dtype == 2 ? 4 : 2);
    Memory input, output, scales, packed, previous, statistics;
    bool good = (c.given & kWeight) == 0 || input.Read(cases, weightBytes);
    if ((c.given & kScaleTensor) != 0) {
        good = good && scales.Read(cases, scaleBytes);
    } else {
        scales.Allocate(scaleBytes);
    }
    good = good && ((c.given & kPreviousTensor) == 0 || previous.Read(cases, packedBytes));
    if (!good) {
        std::fprintf(stderr, "the file of cases ends too early\n");
        return false;
    }
    output.Allocate(weightBytes);
    if ((c.wanted & kPackedTensor) != 0) {
        packed.Allocate(packedBytes);
    }
    if ((c.wanted & kStatisticsTensor) != 0) {
        statistics.Allocate(static_cast<uint64_t>(c.cores) * ternary::kStatisticsWords * sizeof(int32_t));
    }
    const uint32_t unpack = (c.given & kWeight) == 0 ? 1 : 0;
    const ternary::WeightSpec spec{input.Address(), output.Address(), scales.Address(), packed.Address(),
                                   previous.Address(), statistics.Address(), c.rows, c.columns, c.group, c.epsilon,
                                   c.multiplier, c.absmax, (c.given & kScaleTensor) != 0 ? 1u : 0u, unpack};
    const ternary::Plan plan = ternary::MakePlan({spec}, c.space, static_cast<Dtype>(c.dtype), c.cores);
    if (!plan.error.empty()) {
        std::fprintf(stderr, "%s\n", plan.error.c_str());
        return false;
    }
    for (const ternary::Launch& launch : plan.launches) {
        Launch(launch, static_cast<Dtype>(c.dtype));
    }
    for (const Memory* memory : {&output, &scales, &packed, &statistics}) {
        if (memory->bytes != 0 && std::fwrite(memory->data, 1, memory->bytes, results) != memory->bytes) {
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv)
{
    std::FILE* cases = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
    std::FILE* results = argc == 3 ? std::fopen(argv[2], "wb") : nullptr;
    if (cases == nullptr || results == nullptr) {
        std::fprintf(stderr, "usage: ternary_cpu_debug CASES RESULTS\n");
        return 2;
    }
    static_assert(sizeof(Case) == 84, "as the Python side writes it");
    Case c;
    while (std::fread(&c, sizeof(c), 1, cases) == 1) {
        if (!Run(c, cases, results)) {
            return 1;
        }
    }
    return std::fclose(results) == 0 ? 0 : 1;
}
