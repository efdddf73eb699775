// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/empty.h>
#include <acl/acl.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "library.h"

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kDevices = 2;
constexpr int64_t kVectorCores = 4;
constexpr std::size_t kArenaBytes = std::size_t{1} << 30;   // address space that is reserved but not used

struct {
    DeviceIndex device = 0;
    int64_t streams[kDevices] = {0, 0};
    int32_t captureStatus = 0;
    bool capturing = false;
    uint32_t launchStatus = 0;
    bool compute = true;
    bool gone = false;
    StandinCounts counts = {};
} state;

Stream CurrentStream(DeviceIndex device)
{
    return Stream(Stream::UNSAFE, Device(DeviceType::PrivateUse1, device), state.streams[device]);
}

// Returns the handle of a stream, which encodes its device and its number.
aclrtStream HandleOf(const Stream& stream)
{
    return reinterpret_cast<aclrtStream>(1000 * (stream.device_index() + 1) + stream.id());
}

// ------------------------------------------------------------------------------------------------------------ memory

// Allocates the lowest free block of a size, so that the same sequence of requests gets the same addresses again.
class Arena {
public:
    void* Allocate(std::size_t bytes)
    {
        bytes = (std::max<std::size_t>(bytes, 1) + 511) / 512 * 512;
        if (base_ == nullptr) {
            base_ = static_cast<uint8_t*>(mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        }
        auto free = free_.lower_bound({bytes, nullptr});
        void* block = nullptr;
        if (free != free_.end() && free->first == bytes) {
            block = free->second;
            free_.erase(free);
        } else {
            TORCH_CHECK(used_ + bytes <= kArenaBytes, "the stand-in's memory is full");
            block = base_ + used_;
            used_ += bytes;
        }
        sizes_[block] = bytes;
        ++state.counts.blocks;
        return block;
    }
    void Free(void* block)
    {
        free_.insert({sizes_.at(block), block});
        sizes_.erase(block);
        --state.counts.blocks;
    }
    bool Holds(const void* address) const { return address >= base_ && address < base_ + used_; }

private:
    uint8_t* base_ = nullptr;
    std::size_t used_ = 0;
    std::set<std::pair<std::size_t, void*>> free_;
    std::map<void*, std::size_t> sizes_;
};

// These are never destroyed, because tensors may outlive every static object.
Arena* const arenas = new Arena[kDevices];
Arena* const pinned = new Arena;

void FreeAnywhere(void* block)
{
    if (state.gone) {
        std::fputs("memory is freed on a device whose runtime has ended\n", stderr);
        std::abort();
    }
    for (DeviceIndex i = 0; i < kDevices; ++i) {
        if (arenas[i].Holds(block)) {
            arenas[i].Free(block);
            return;
        }
    }
    ++state.counts.blocks;   // pinned memory does not count
    pinned->Free(block);
}

class DeviceAllocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t bytes) override
    {
        void* block = arenas[state.device].Allocate(bytes);
        return {block, block, &FreeAnywhere, Device(DeviceType::PrivateUse1, state.device)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &FreeAnywhere; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

class PinnedAllocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t bytes) override
    {
        void* block = pinned->Allocate(bytes);
        --state.counts.blocks;
        return {block, block, &FreeAnywhere, Device(DeviceType::CPU)};
    }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceAllocator deviceAllocator;
PinnedAllocator pinnedAllocator;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &deviceAllocator)

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    bool isPinnedPtr(const void* data) const override { return pinned->Holds(data); }
    c10::Allocator* getPinnedMemoryAllocator() const override { return &pinnedAllocator; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return DeviceType::PrivateUse1; }
    Device exchangeDevice(Device device) const override
    {
        const Device before = getDevice();
        setDevice(device);
        return before;
    }
    Device getDevice() const override { return Device(DeviceType::PrivateUse1, state.device); }
    void setDevice(Device device) const override { state.device = device.index(); }
    void uncheckedSetDevice(Device device) const noexcept override { state.device = device.index(); }
    Stream getStream(Device device) const override { return CurrentStream(device.index()); }
    Stream exchangeStream(Stream stream) const override
    {
        const Stream before = CurrentStream(stream.device_index());
        state.streams[stream.device_index()] = stream.id();
        return before;
    }
    DeviceIndex deviceCount() const noexcept override { return kDevices; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// --------------------------------------------------------------------------------------------------------------- ops

at::Tensor EmptyStrided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                        std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>)
{
    const c10::OptionalDeviceGuard guard(device);
    return at::detail::empty_strided_generic(size, stride, &deviceAllocator,
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             dtype.value_or(at::kFloat));
}

at::Tensor Empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format)
{
    const c10::OptionalDeviceGuard guard(device);
    return at::detail::empty_generic(size, &deviceAllocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     dtype.value_or(at::kFloat), format);
}

// Returns a host tensor that aliases device memory, for copies with strides and conversions.
at::Tensor OnHost(const at::Tensor& tensor)
{
    at::Tensor host = at::detail::empty_strided_cpu(tensor.sizes(), tensor.strides(), tensor.scalar_type());
    auto storage = c10::Storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                                c10::DataPtr(tensor.storage().mutable_data(), Device(DeviceType::CPU)));
    host.set_(storage, tensor.storage_offset(), tensor.sizes(), tensor.strides());
    return host;
}

at::Tensor CopyFrom(const at::Tensor& from, const at::Tensor& to, bool nonBlocking)
{
    if (from.is_cpu() && from.scalar_type() == at::kInt && !to.is_cpu()) {
        ++state.counts.uploads;
        state.counts.waitingUploads += nonBlocking && pinned->Holds(from.data_ptr()) ? 0 : 1;
        state.counts.strayUploads += state.capturing ? 1 : 0;
    }
    const at::Tensor source = from.is_cpu() ? from : OnHost(from);
    at::Tensor target = to.is_cpu() ? to : OnHost(to);
    target.copy_(source);
    return to;
}

at::Tensor CopyFromAndResize(const at::Tensor& from, const at::Tensor& to)
{
    return CopyFrom(from, to, false);
}

void OnTheHost(const c10::OperatorHandle& op, torch::jit::Stack* stack)
{
    at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m)
{
    m.fallback(torch::CppFunction::makeFromBoxedFunction<&OnTheHost>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m)
{
    m.impl("empty.memory_format", &Empty);
    m.impl("empty_strided", &EmptyStrided);
    m.impl("_copy_from", &CopyFrom);
    m.impl("_copy_from_and_resize", &CopyFromAndResize);
}

[[maybe_unused]] const bool hooked = [] {
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
}();

uint32_t LaunchKernel(uint32_t kernel, uint32_t dtype, uint32_t blocks, aclrtStream stream, void* table)
{
    // The runtime ends before any static object that was created before the first launch is destroyed.
    [[maybe_unused]] static const int ends = std::atexit([] { state.gone = true; });
    ++state.counts.launches;
    if (!arenas[state.device].Holds(table) || stream != HandleOf(CurrentStream(state.device))) {
        ++state.counts.strayLaunches;
    }
    if (state.launchStatus != 0 || !state.compute) {
        return state.launchStatus;
    }
    char error[400] = "";
    const int32_t failed = ternary_emulate_table(kernel, dtype, blocks, static_cast<const uint32_t*>(table), error,
                                                 sizeof(error));
    TORCH_CHECK(failed == 0, "the emulated kernel: ", error);
    return 0;
}

}  // namespace

// ------------------------------------------------------------------------------------------------- CANN and torch_npu

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo which, int64_t* value)
{
    *value = which == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? kVectorCores : 1;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream, aclmdlRICaptureStatus* status, aclmdlRI* graph)
{
    *status = state.capturing ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    *graph = nullptr;
    return state.captureStatus;
}

namespace c10_npu {

NPUStream getCurrentNPUStream(DeviceIndex device)
{
    return NPUStream(CurrentStream(device));
}

aclrtStream NPUStream::stream(const bool wait) const
{
    state.counts.queueWaits += wait ? 1 : 0;
    return HandleOf(stream_);
}

}  // namespace c10_npu

namespace at_npu::native {

OpCommand& OpCommand::Name(const std::string& name)
{
    name_ = name;
    return *this;
}

OpCommand& OpCommand::SetCustomHandler(std::function<int()> handler)
{
    handler_ = std::move(handler);
    return *this;
}

void OpCommand::Run()
{
    const int status = handler_();
    TORCH_CHECK(status == 0, "NPU function error: ", name_, ", error code is ", status);
}

}  // namespace at_npu::native

#define LAUNCH(name, kernel, dtype)                                                       \
    extern "C" uint32_t aclrtlaunch_##name(uint32_t blocks, void* stream, void* table)    \
    {                                                                                     \
        return LaunchKernel(kernel, dtype, blocks, stream, table);                        \
    }
LAUNCH(ternary_tile_bf16, 0, 0)
LAUNCH(ternary_tile_fp16, 0, 1)
LAUNCH(ternary_tile_fp32, 0, 2)
LAUNCH(ternary_rows_bf16, 1, 0)
LAUNCH(ternary_rows_fp16, 1, 1)
LAUNCH(ternary_rows_fp32, 1, 2)

// ------------------------------------------------------------------------------------------------------------- tests

void standin_counts(StandinCounts* counts)
{
    *counts = state.counts;
}

void standin_set_stream(int64_t stream)
{
    state.streams[state.device] = stream;
}

void standin_set_capture(int32_t status, int32_t capturing)
{
    state.captureStatus = status;
    state.capturing = capturing != 0;
}

void standin_set_launches(uint32_t status, int32_t compute)
{
    state.launchStatus = status;
    state.compute = compute != 0;
}
