// SPDX-License-Identifier: Apache-2.0
// The ops of bitcpm_megatron/ops/ascendc.py on an NPU. Their schemas stand there.
#include <acl/acl.h>
#include <torch/library.h>
#include <torch/torch.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <cstring>
#include <deque>
#include <mutex>
#include <tuple>
#include <vector>

#include "../op_host/tiling.h"
#include "aclrtlaunch_ternary_rows_bf16.h"
#include "aclrtlaunch_ternary_rows_fp16.h"
#include "aclrtlaunch_ternary_rows_fp32.h"
#include "aclrtlaunch_ternary_tile_bf16.h"
#include "aclrtlaunch_ternary_tile_fp16.h"
#include "aclrtlaunch_ternary_tile_fp32.h"

namespace {

using at::Tensor;
using ternary::Dtype;
using ternary::Kernel;
using ternary::Launch;
using ternary::WeightSpec;

Dtype DtypeOf(at::ScalarType type)
{
    switch (type) {
        case at::kBFloat16:
            return Dtype::BF16;
        case at::kHalf:
            return Dtype::FP16;
        case at::kFloat:
            return Dtype::FP32;
        default:
            TORCH_CHECK(false, "the ternary kernels take bf16, fp16 and fp32, not ", type);
    }
}

uint64_t AddressOf(const Tensor& tensor)
{
    return reinterpret_cast<uint64_t>(tensor.data_ptr());
}

// Never a constant: 48 vector cores on some chips of the family, 40 on others.
uint32_t VectorCores(const at::Device& device)
{
    int64_t cores = 0;
    const aclError status = aclGetDeviceCapability(device.index(), ACL_DEVICE_INFO_VECTOR_CORE_NUM, &cores);
    TORCH_CHECK(status == ACL_SUCCESS && cores > 0, "the number of vector cores is not known: error ", status);
    return static_cast<uint32_t>(cores);
}

// The table of a launch on the device. The caching allocator hands out the same addresses step after step, so that the
// table of the last step usually serves again, without a copy.
Tensor DeviceTable(const std::vector<uint32_t>& words, const at::Device& device)
{
    struct Known {
        at::Device device;
        std::vector<uint32_t> words;
        Tensor tensor;
    };
    constexpr std::size_t kMost = 64;
    static std::mutex mutex;
    static std::deque<Known> cache;
    const std::lock_guard<std::mutex> guard(mutex);
    for (const Known& known : cache) {
        if (known.device == device && known.words == words) {
            return known.tensor;
        }
    }
    const auto count = static_cast<int64_t>(words.size());
    const Tensor host = at::empty({count}, at::TensorOptions().dtype(at::kInt));
    std::memcpy(host.data_ptr(), words.data(), words.size() * sizeof(uint32_t));
    const Tensor copy = host.to(device);
    cache.push_back({device, words, copy});
    if (cache.size() > kMost) {
        cache.pop_front();
    }
    return copy;
}

void LaunchOne(const Launch& launch, Dtype dtype, void* stream, void* table)
{
    const uint32_t blocks = launch.blocks;
    if (launch.kernel == Kernel::Tile) {
        switch (dtype) {
            case Dtype::BF16:
                ACLRT_LAUNCH_KERNEL(ternary_tile_bf16)(blocks, stream, table);
                return;
            case Dtype::FP16:
                ACLRT_LAUNCH_KERNEL(ternary_tile_fp16)(blocks, stream, table);
                return;
            case Dtype::FP32:
                ACLRT_LAUNCH_KERNEL(ternary_tile_fp32)(blocks, stream, table);
                return;
        }
    }
    switch (dtype) {
        case Dtype::BF16:
            ACLRT_LAUNCH_KERNEL(ternary_rows_bf16)(blocks, stream, table);
            return;
        case Dtype::FP16:
            ACLRT_LAUNCH_KERNEL(ternary_rows_fp16)(blocks, stream, table);
            return;
        case Dtype::FP32:
            ACLRT_LAUNCH_KERNEL(ternary_rows_fp32)(blocks, stream, table);
            return;
    }
}

void Run(const std::vector<WeightSpec>& specs, Dtype dtype, const at::Device& device, uint32_t cores)
{
    const ternary::Plan plan = ternary::MakePlan(specs, dtype, cores);
    TORCH_CHECK(plan.error.empty(), "ternary kernels: ", plan.error);
    void* stream = c10_npu::getCurrentNPUStream(device.index()).stream();
    for (const Launch& launch : plan.launches) {
        const Tensor table = DeviceTable(launch.table, device);
        // Through torch_npu's task queue, so that the order among other ops holds.
        at_npu::native::OpCommand command;
        command.Name("bitcpm_ternary_quantize");
        command.SetCustomHandler([launch, dtype, stream, table]() -> int {
            LaunchOne(launch, dtype, stream, table.data_ptr());
            return 0;
        });
        command.Run();
    }
}

using Lists = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

Lists Quantize(at::TensorList weights, at::IntArrayRef groups, double eps, at::TensorList scales,
               at::TensorList previous, bool pack, bool count)
{
    TORCH_CHECK(!weights.empty() && weights.size() == groups.size(), "one group size per weight");
    TORCH_CHECK(scales.empty() || scales.size() == weights.size(), "scales of all weights, or of none");
    TORCH_CHECK(previous.empty() || previous.size() == weights.size(), "previous codes of all weights, or of none");
    const at::Device device = weights[0].device();
    const Dtype dtype = DtypeOf(weights[0].scalar_type());
    const uint32_t cores = VectorCores(device);
    const bool counts = count || !previous.empty();

    Lists results;
    auto& [quantized, own, packed, totals] = results;
    std::vector<Tensor> statistics;
    std::vector<WeightSpec> specs;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const Tensor& w = weights[i];
        TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.device() == device, "weight ", i,
                    ": not a contiguous matrix on the first one's device");
        TORCH_CHECK(w.scalar_type() == weights[0].scalar_type(), "weight ", i, " has another dtype than the first");
        TORCH_CHECK(groups[i] > 0 && w.size(1) % groups[i] == 0, "weight ", i, ": groups do not divide the row");
        const int64_t scaleColumns = w.size(1) / groups[i];
        const int64_t packedColumns = static_cast<int64_t>(ternary::PackedBytes(1, w.size(1)));
        quantized.push_back(at::empty_like(w));
        if (scales.empty()) {
            own.push_back(at::empty({w.size(0), scaleColumns}, w.options().dtype(at::kBFloat16)));
        } else {
            const Tensor& s = scales[i];
            TORCH_CHECK(s.scalar_type() == at::kBFloat16 && s.is_contiguous() && s.size(0) == w.size(0) &&
                            s.size(1) == scaleColumns, "weight ", i, ": the scales do not fit");
            own.push_back(s.clone());
        }
        if (pack) {
            packed.push_back(at::empty({w.size(0), packedColumns}, w.options().dtype(at::kByte)));
        }
        if (counts) {
            statistics.push_back(at::zeros({cores, 2, ternary::kStatisticsLanes}, w.options().dtype(at::kInt)));
        }
        if (!previous.empty()) {
            const Tensor& p = previous[i];
            TORCH_CHECK(p.scalar_type() == at::kByte && p.is_contiguous() && p.size(0) == w.size(0) &&
                            p.size(1) == packedColumns, "weight ", i, ": the previous codes do not fit");
        }
        specs.push_back({AddressOf(w), AddressOf(quantized[i]), AddressOf(own[i]), pack ? AddressOf(packed[i]) : 0,
                         previous.empty() ? 0 : AddressOf(previous[i]), counts ? AddressOf(statistics[i]) : 0,
                         static_cast<uint32_t>(w.size(0)), static_cast<uint32_t>(w.size(1)),
                         static_cast<uint32_t>(groups[i]), static_cast<float>(eps), !scales.empty(), 0});
    }
    Run(specs, dtype, device, cores);
    for (const Tensor& lanes : statistics) {
        totals.push_back(lanes.sum(at::IntArrayRef({0, 2}), false, at::kLong));
    }
    return results;
}

Tensor Unpack(const Tensor& packed, const Tensor& scales, int64_t columns, at::ScalarType type)
{
    TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.is_contiguous() &&
                    packed.size(1) == static_cast<int64_t>(ternary::PackedBytes(1, columns)),
                "packed codes do not fit rows of ", columns);
    TORCH_CHECK(scales.scalar_type() == at::kBFloat16 && scales.dim() == 2 && scales.is_contiguous() &&
                    scales.size(0) == packed.size(0) && scales.size(1) > 0 && columns % scales.size(1) == 0,
                "scales do not fit the packed codes");
    Tensor weight = at::empty({packed.size(0), columns}, packed.options().dtype(type));
    const WeightSpec spec{0, AddressOf(weight), AddressOf(scales), 0, AddressOf(packed), 0,
                          static_cast<uint32_t>(packed.size(0)), static_cast<uint32_t>(columns),
                          static_cast<uint32_t>(columns / scales.size(1)), 0.0f, 1, 1};
    Run({spec}, DtypeOf(type), packed.device(), VectorCores(packed.device()));
    return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(bitcpm, PrivateUse1, m)
{
    m.impl("ascendc_quantize", &Quantize);
    m.impl("ascendc_unpack", &Unpack);
}
