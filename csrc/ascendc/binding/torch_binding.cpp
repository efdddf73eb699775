// SPDX-License-Identifier: Apache-2.0
// The ops of bitcpm_megatron/ops/ascendc.py on an NPU. Their schemas stand there.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <acl/acl.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../op_host/tiling.h"
#include "launch_tables.h"
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
using ternary::Space;
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

// Is a graph being captured on this stream? Chips without graphs answer that they know none.
bool Capturing(aclrtStream stream)
{
    aclmdlRICaptureStatus capture = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    aclmdlRI graph = nullptr;
    const aclError status = aclmdlRICaptureGetInfo(stream, &capture, &graph);
    TORCH_CHECK(status == ACL_SUCCESS || status == ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "ternary kernels: it is not known whether a graph is being captured: aclError ", status);
    return status == ACL_SUCCESS && capture != ACL_MODEL_RI_CAPTURE_STATUS_NONE;
}

// A kernel as the toolkit wraps it: what it returns is the aclError of the launch.
struct Entry {
    const char* name;
    uint32_t (*launch)(uint32_t blocks, aclrtStream stream, void* table);
};

#define TERNARY_ENTRY(kernel)                                                                      \
    Entry                                                                                          \
    {                                                                                              \
        #kernel, [](uint32_t blocks, aclrtStream stream, void* table) -> uint32_t {                \
            return ACLRT_LAUNCH_KERNEL(kernel)(blocks, stream, table);                             \
        }                                                                                          \
    }

Entry EntryOf(Kernel kernel, Dtype dtype)
{
    // By Kernel and Dtype.
    static const Entry entries[2][3] = {
        {TERNARY_ENTRY(ternary_tile_bf16), TERNARY_ENTRY(ternary_tile_fp16), TERNARY_ENTRY(ternary_tile_fp32)},
        {TERNARY_ENTRY(ternary_rows_bf16), TERNARY_ENTRY(ternary_rows_fp16), TERNARY_ENTRY(ternary_rows_fp32)}};
    return entries[static_cast<uint32_t>(kernel)][static_cast<uint32_t>(dtype)];
}

// Returns the number of launches.
int64_t Run(const std::vector<WeightSpec>& specs, const Space& space, Dtype dtype, const at::Device& device,
            uint32_t cores)
{
    const ternary::Plan plan = ternary::MakePlan(specs, space, dtype, cores);
    TORCH_CHECK(plan.error.empty(), "ternary kernels: ", plan.error);
    const c10_npu::NPUStream current = c10_npu::getCurrentNPUStream(device.index());
    // Without a wait for torch_npu's task queue: the launches go through it, so that their order among other ops holds.
    const aclrtStream stream = current.stream(false);
    const bool capturing = Capturing(stream);
    for (const Launch& launch : plan.launches) {
        const Entry entry = EntryOf(launch.kernel, dtype);
        const Tensor table = ternary::LaunchTables::Get().Find(launch.table, current.unwrap(), capturing);
        at_npu::native::OpCommand command;
        command.Name(entry.name);
        command.SetCustomHandler([entry, blocks = launch.blocks, stream, table]() -> int {
            const uint32_t status = entry.launch(blocks, stream, table.data_ptr());
            // The weights are uninitialized memory then. From the task queue this is raised by the next op.
            TORCH_CHECK(status == ACL_SUCCESS, "ternary kernels: ", entry.name, " was not launched: aclError ", status);
            return ACL_SUCCESS;
        });
        command.Run();
    }
    return static_cast<int64_t>(plan.launches.size());
}

// Without thresholds: ternary.
Space SpaceOf(at::ArrayRef<double> thresholds, at::ArrayRef<double> levels, int64_t upperTies)
{
    const std::size_t count = thresholds.size();
    TORCH_CHECK(count <= ternary::kMostThresholds && levels.size() == (count == 0 ? 0 : count + 1) && upperTies >= 0 &&
                    upperTies >> count == 0,
                "ternary kernels: ", levels.size(), " levels, ", count, " thresholds and the ties ", upperTies,
                " are no space");
    Space space{};
    space.thresholds = static_cast<uint32_t>(count);
    space.upperTies = static_cast<uint32_t>(upperTies);
    std::copy(thresholds.begin(), thresholds.end(), space.threshold);
    std::copy(levels.begin(), levels.end(), space.level);
    return space;
}

// What a result or an input of weight `i` has to be; `what` names it in the error.
void CheckTensor(const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type, const at::Device& device,
                 std::size_t i, const char* what)
{
    TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.device() == device &&
                    tensor.sizes() == sizes,
                "weight ", i, ": the ", what, " do not fit");
}

// Without weights the quantized ones are quantized where they stand: every tile is read before it is written.
std::tuple<std::vector<Tensor>, int64_t> Quantize(at::TensorList weights, at::TensorList quantized,
                                                  at::TensorList scales, at::TensorList packed,
                                                  at::TensorList previous, at::IntArrayRef groups, double eps,
                                                  double multiplier, bool absmax, at::ArrayRef<double> thresholds,
                                                  at::ArrayRef<double> levels, int64_t upperTies, bool given,
                                                  bool count)
{
    const at::TensorList latent = weights.empty() ? quantized : weights;
    TORCH_CHECK(!latent.empty() && latent.size() == groups.size(), "one group size per weight");
    TORCH_CHECK(quantized.size() == latent.size() && scales.size() == latent.size(),
                "one quantized weight per weight, and its scales");
    TORCH_CHECK(packed.empty() || packed.size() == latent.size(), "packed codes of all weights, or of none");
    TORCH_CHECK(previous.empty() || previous.size() == latent.size(), "previous codes of all weights, or of none");
    const at::Device device = latent[0].device();
    const at::ScalarType type = latent[0].scalar_type();
    const c10::DeviceGuard guard(device);
    const Dtype dtype = DtypeOf(type);
    const Space space = SpaceOf(thresholds, levels, upperTies);
    const uint32_t cores = VectorCores(device);
    const bool counts = count || !previous.empty();

    std::vector<Tensor> statistics;
    std::vector<WeightSpec> specs;
    for (std::size_t i = 0; i < latent.size(); ++i) {
        const Tensor& w = latent[i];
        TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.device() == device, "weight ", i,
                    ": not a contiguous matrix on the first one's device");
        TORCH_CHECK(w.scalar_type() == type, "weight ", i, " has another dtype than the first");
        TORCH_CHECK(groups[i] > 0 && w.size(1) % groups[i] == 0, "weight ", i, ": groups do not divide the row");
        const int64_t packedColumns = static_cast<int64_t>(ternary::PackedBytes(1, w.size(1)));
        CheckTensor(quantized[i], w.sizes(), type, device, i, "quantized values");
        CheckTensor(scales[i], {w.size(0), w.size(1) / groups[i]}, at::kBFloat16, device, i, "scales");
        if (!packed.empty()) {
            CheckTensor(packed[i], {w.size(0), packedColumns}, at::kByte, device, i, "packed codes");
        }
        if (!previous.empty()) {
            CheckTensor(previous[i], {w.size(0), packedColumns}, at::kByte, device, i, "previous codes");
        }
        if (counts) {
            statistics.push_back(at::zeros({cores, 2, ternary::kStatisticsLanes}, w.options().dtype(at::kInt)));
        }
        specs.push_back({AddressOf(w), AddressOf(quantized[i]), AddressOf(scales[i]),
                         packed.empty() ? 0 : AddressOf(packed[i]), previous.empty() ? 0 : AddressOf(previous[i]),
                         counts ? AddressOf(statistics[i]) : 0, static_cast<uint32_t>(w.size(0)),
                         static_cast<uint32_t>(w.size(1)), static_cast<uint32_t>(groups[i]), static_cast<float>(eps),
                         static_cast<float>(multiplier), absmax, given, 0});
    }
    const int64_t launches = Run(specs, space, dtype, device, cores);
    std::vector<Tensor> totals;
    for (const Tensor& lanes : statistics) {
        totals.push_back(lanes.sum(at::IntArrayRef({0, 2}), false, at::kLong));
    }
    return {totals, launches};
}

Tensor Unpack(const Tensor& packed, const Tensor& scales, int64_t columns, at::ScalarType type)
{
    const c10::DeviceGuard guard(packed.device());
    TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.is_contiguous() &&
                    packed.size(1) == static_cast<int64_t>(ternary::PackedBytes(1, columns)),
                "packed codes do not fit rows of ", columns);
    TORCH_CHECK(scales.scalar_type() == at::kBFloat16 && scales.dim() == 2 && scales.is_contiguous() &&
                    scales.device() == packed.device() && scales.size(0) == packed.size(0) && scales.size(1) > 0 &&
                    columns % scales.size(1) == 0,
                "scales do not fit the packed codes");
    Tensor weight = at::empty({packed.size(0), columns}, packed.options().dtype(type));
    const WeightSpec spec{0, AddressOf(weight), AddressOf(scales), 0, AddressOf(packed), 0,
                          static_cast<uint32_t>(packed.size(0)), static_cast<uint32_t>(columns),
                          static_cast<uint32_t>(columns / scales.size(1)), 0.0f, 1.0f, 0, 1, 1};
    Run({spec}, Space{}, DtypeOf(type), packed.device(), VectorCores(packed.device()));
    return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(bitcpm, PrivateUse1, m)
{
    m.impl("ascendc_quantize", &Quantize);
    m.impl("ascendc_unpack", &Unpack);
}
