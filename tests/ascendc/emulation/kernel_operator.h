// SPDX-License-Identifier: Apache-2.0
// A strict implementation, for g++ on a CPU, of the part of the AscendC vector API that the kernels use; machine.h
// checks every access. Written from the public documentation for NPU architecture 2201 (Atlas A2); names and parameters
// are the API's. It has only what CANN 8.5.0 has, the oldest toolkit that CMakeLists.txt accepts, so that a newer name
// does not compile here.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

#define __global__
#define __aicore__
#define __gm__
#define KERNEL_TASK_TYPE_DEFAULT(type)

using GM_ADDR = uint8_t*;

enum pipe_t { PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace AscendC {

using emulation::Buffer;
using emulation::Fail;
using emulation::Machine;
using emulation::Position;
using emulation::Range;
using emulation::Require;
using emulation::State;
using emulation::Transfer;

enum class TPosition { VECIN, VECOUT, VECCALC };
enum class CMPMODE { LT, GT, EQ, LE, GE, NE };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
enum class SELMODE { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };

// An integer parameter with the range of the hardware's field; a value that does not fit is an error and does not wrap.
template <uint32_t kHighest>
class Field {
public:
    template <typename Integer>
    Field(Integer value) : value_(static_cast<uint32_t>(value))
    {
        Require(value >= 0 && static_cast<uint64_t>(value) <= kHighest, "limits", "a parameter beyond its field");
    }
    operator uint32_t() const { return value_; }

private:
    uint32_t value_;
};

struct UnaryRepeatParams {
    Field<65535> dstBlkStride;
    Field<65535> srcBlkStride;
    Field<255> dstRepStride;
    Field<255> srcRepStride;
};

struct BinaryRepeatParams {
    Field<255> dstBlkStride;
    Field<255> src0BlkStride;
    Field<255> src1BlkStride;
    Field<255> dstRepStride;
    Field<255> src0RepStride;
    Field<255> src1RepStride;
};

struct BrcbRepeatParams {
    Field<65535> dstBlkStride;
    Field<65535> dstRepStride;
};

struct DataCopyExtParams {
    Field<4095> blockCount;
    Field<2097151> blockLen;
    Field<0xFFFFFFFF> srcStride;
    Field<0xFFFFFFFF> dstStride;
    Field<65535> rsv;
};

template <typename T>
struct DataCopyPadExtParams {
    bool isPad;
    Field<255> leftPadding;
    Field<255> rightPadding;
    T paddingValue;
};

inline int64_t GetBlockIdx() { return Machine::Get().core; }
inline int64_t GetBlockNum() { return Machine::Get().cores; }

template <pipe_t pipe>
inline void PipeBarrier()
{
    static_assert(pipe != PIPE_MTE2 && pipe != PIPE_MTE3, "not modeled");
    Machine::Get().Barrier();
    if (pipe == PIPE_ALL) {
        Machine::Get().SettleAll();
    }
}

// ------------------------------------------------------------------------------------------------------- tensors

template <typename T>
class GlobalTensor {
public:
    void SetGlobalBuffer(T* address) { address_ = address; }
    void SetGlobalBuffer(T* address, uint64_t) { address_ = address; }
    GlobalTensor operator[](uint64_t offset) const
    {
        GlobalTensor other;
        other.address_ = address_ + offset;
        return other;
    }
    T* Address() const { return address_; }
    // The scalar unit reads through its own cache, and reads only words of tables.
    T GetValue(uint64_t offset) const
    {
        Machine::Get().CheckGlobal(reinterpret_cast<uintptr_t>(address_ + offset), sizeof(T), false);
        Machine::Get().counters.tableBytes += sizeof(T);
        return address_[offset];
    }

private:
    T* address_ = nullptr;
};

template <typename T>
class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(uint32_t buffer, uint32_t generation, uint32_t begin)
        : buffer_(buffer), generation_(generation), begin_(begin)
    {
    }
    LocalTensor operator[](uint32_t offset) const
    {
        return LocalTensor(buffer_, generation_, begin_ + offset * static_cast<uint32_t>(sizeof(T)));
    }
    template <typename U>
    LocalTensor<U> ReinterpretCast() const
    {
        return LocalTensor<U>(buffer_, generation_, begin_);
    }
    uint32_t Buffer() const { return buffer_; }
    uint32_t Generation() const { return generation_; }
    uint32_t Begin() const { return begin_; }

private:
    uint32_t buffer_ = 0xFFFFFFFF;
    uint32_t generation_ = 0;
    uint32_t begin_ = 0;
};

}  // namespace AscendC

namespace emulation {

using AscendC::LocalTensor;

// The bytes that an instruction accesses through one operand.
struct Operand {
    uint32_t buffer;
    uint32_t generation;
    uint32_t begin;
    uint32_t elementBytes;
    uint32_t blockStride = 1;
    uint32_t repeatStride = 8;
    std::vector<Range> ranges;

    template <typename T>
    static Operand Of(const LocalTensor<T>& tensor, uint32_t alignment = kBlockBytes)
    {
        Require(tensor.Begin() % alignment == 0, "alignment", "a vector operand is not aligned");
        return {tensor.Buffer(), tensor.Generation(), tensor.Begin(), sizeof(T), 1, 8, {}};
    }
    Operand& Strides(uint32_t block, uint32_t repeat)
    {
        blockStride = block;
        repeatStride = repeat;
        return *this;
    }
    uint32_t Address(uint32_t repeat, uint32_t element) const
    {
        const uint32_t perBlock = kBlockBytes / elementBytes;
        return begin + (repeat * repeatStride + element / perBlock * blockStride) * kBlockBytes +
               element % perBlock * elementBytes;
    }
    void Add(uint32_t at, uint32_t bytes)
    {
        if (!ranges.empty() && ranges.back().begin + ranges.back().bytes == at) {
            ranges.back().bytes += bytes;
        } else {
            ranges.push_back({at, bytes});
        }
    }
    void Contiguous(uint32_t count) { Add(begin, count * elementBytes); }
    // Adds `lanes` active elements in each of `repeats` iterations.
    void Iterate(uint32_t repeats, uint32_t lanes)
    {
        const uint32_t perBlock = kBlockBytes / elementBytes;
        for (uint32_t r = 0; r < repeats; ++r) {
            for (uint32_t e = 0; e < lanes; e += perBlock) {
                Add(Address(r, e), std::min(perBlock, lanes - e) * elementBytes);
            }
        }
    }
    bool SamePlaces(const Operand& other) const
    {
        return begin == other.begin && elementBytes == other.elementBytes && blockStride == other.blockStride &&
               repeatStride == other.repeatStride;
    }
};

// Checks all accesses of an instruction before it computes, and stamps its bytes.
template <std::size_t kSources>
inline void Access(Operand& result, std::array<Operand*, kSources> sources, uint64_t repeats)
{
    Machine& machine = Machine::Get();
    machine.BeginInstruction(repeats);
    auto reach = [&](const Operand& operand) {
        machine.CheckVectorAccess(operand.buffer < machine.buffers.size() ? operand.buffer : 0);
        for (const Range& range : operand.ranges) {
            machine.CheckHandle(operand.buffer, operand.generation, range);
        }
    };
    reach(result);
    for (Operand* source : sources) {
        reach(*source);
        for (const Range& range : source->ranges) {
            machine.CheckRead(range);
        }
    }
    for (const Range& range : result.ranges) {
        machine.CheckWrite(range);
    }
    for (Operand* source : sources) {
        if (source->SamePlaces(result)) {
            continue;
        }
        for (const Range& range : source->ranges) {
            Require(!machine.Overlaps(range), "overlap", "result and source overlap in part");
        }
    }
    for (Operand* source : sources) {
        for (const Range& range : source->ranges) {
            machine.MarkRead(range);
        }
    }
    for (const Range& range : result.ranges) {
        machine.MarkWrite(range);
    }
}

inline uint32_t Lanes(uint32_t elementBytes) { return kVectorBytes / elementBytes; }

inline uint64_t RepeatsOf(uint32_t count, uint32_t elementBytes)
{
    return (static_cast<uint64_t>(count) * elementBytes + kVectorBytes - 1) / kVectorBytes;
}

inline void CheckCount(int64_t count) { Require(count > 0, "limits", "an instruction without elements"); }

inline void CheckMask(uint64_t mask, uint64_t repeats, uint32_t elementBytes)
{
    Require(mask >= 1 && mask <= Lanes(elementBytes), "limits", "mask beyond 256 bytes, or empty");
    Require(repeats >= 1 && repeats <= 255, "limits", "repeat beyond 255, or none");
}

template <typename T>
inline T At(uint32_t address)
{
    T value;
    std::memcpy(&value, Machine::Get().ub + address, sizeof(T));
    return value;
}

template <typename T>
inline void Put(uint32_t address, T value)
{
    std::memcpy(Machine::Get().ub + address, &value, sizeof(T));
}

template <typename T, typename... Allowed>
constexpr bool kOneOf = (std::is_same_v<T, Allowed> || ...);

template <typename D, typename S, typename Function>
inline void UnaryCount(const LocalTensor<D>& dst, const LocalTensor<S>& src, int64_t count, Function function)
{
    CheckCount(count);
    const uint32_t n = static_cast<uint32_t>(count);
    Operand result = Operand::Of(dst);
    Operand source = Operand::Of(src);
    result.Contiguous(n);
    source.Contiguous(n);
    Access<1>(result, {&source}, RepeatsOf(n, std::max(sizeof(D), sizeof(S))));
    for (uint32_t i = 0; i < n; ++i) {
        Put<D>(result.begin + i * sizeof(D), function(At<S>(source.begin + i * sizeof(S))));
    }
}

template <typename D, typename S, typename Function>
inline void UnaryRepeat(const LocalTensor<D>& dst, const LocalTensor<S>& src, uint64_t mask, uint64_t repeats,
                        const AscendC::UnaryRepeatParams& params, Function function)
{
    CheckMask(mask, repeats, std::max(sizeof(D), sizeof(S)));
    Require(params.dstBlkStride != 0, "limits", "a result block stride of 0");
    Operand result = Operand::Of(dst).Strides(params.dstBlkStride, params.dstRepStride);
    Operand source = Operand::Of(src).Strides(params.srcBlkStride, params.srcRepStride);
    result.Iterate(repeats, mask);
    source.Iterate(repeats, mask);
    Access<1>(result, {&source}, repeats);
    for (uint32_t r = 0; r < repeats; ++r) {
        for (uint32_t e = 0; e < mask; ++e) {
            Put<D>(result.Address(r, e), function(At<S>(source.Address(r, e))));
        }
    }
}

template <typename T, typename Function>
inline void BinaryCount(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                        int64_t count, Function function)
{
    CheckCount(count);
    const uint32_t n = static_cast<uint32_t>(count);
    Operand result = Operand::Of(dst);
    Operand first = Operand::Of(src0);
    Operand second = Operand::Of(src1);
    for (Operand* operand : {&result, &first, &second}) {
        operand->Contiguous(n);
    }
    Access<2>(result, {&first, &second}, RepeatsOf(n, sizeof(T)));
    for (uint32_t i = 0; i < n; ++i) {
        const uint32_t offset = i * sizeof(T);
        Put<T>(result.begin + offset, function(At<T>(first.begin + offset), At<T>(second.begin + offset)));
    }
}

template <typename T, typename Function>
inline void BinaryRepeat(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                         uint64_t mask, uint64_t repeats, const AscendC::BinaryRepeatParams& params, Function function)
{
    CheckMask(mask, repeats, sizeof(T));
    Require(params.dstBlkStride != 0, "limits", "a result block stride of 0");
    Operand result = Operand::Of(dst).Strides(params.dstBlkStride, params.dstRepStride);
    Operand first = Operand::Of(src0).Strides(params.src0BlkStride, params.src0RepStride);
    Operand second = Operand::Of(src1).Strides(params.src1BlkStride, params.src1RepStride);
    for (Operand* operand : {&result, &first, &second}) {
        operand->Iterate(repeats, mask);
    }
    Access<2>(result, {&first, &second}, repeats);
    for (uint32_t r = 0; r < repeats; ++r) {
        for (uint32_t e = 0; e < mask; ++e) {
            Put<T>(result.Address(r, e), function(At<T>(first.Address(r, e)), At<T>(second.Address(r, e))));
        }
    }
}

// Float arithmetic is done in float; half arithmetic in double, which holds every exact result, and rounded once.
template <typename T, typename Function>
inline T Compute(T a, T b, Function function)
{
    if constexpr (std::is_same_v<T, float>) {
        return function(a, b);
    } else {
        return FromValue<T>(function(Value(a), Value(b)), RoundMode::CAST_RINT);
    }
}

struct Plus {
    template <typename N>
    N operator()(N a, N b) const { return a + b; }
};
struct Minus {
    template <typename N>
    N operator()(N a, N b) const { return a - b; }
};
struct Times {
    template <typename N>
    N operator()(N a, N b) const { return a * b; }
};
struct Over {
    template <typename N>
    N operator()(N a, N b) const { return a / b; }
};
// What the hardware returns if one operand is NaN is not documented: this returns the other operand, which is the worse
// case for a kernel that must keep NaN.
struct Larger {
    template <typename N>
    N operator()(N a, N b) const { return std::isnan(static_cast<double>(a)) || a < b ? b : a; }
};
struct Smaller {
    template <typename N>
    N operator()(N a, N b) const { return std::isnan(static_cast<double>(a)) || b < a ? b : a; }
};

inline bool Holds(double a, double b, AscendC::CMPMODE mode)
{
    switch (mode) {
        case AscendC::CMPMODE::LT:
            return a < b;
        case AscendC::CMPMODE::GT:
            return a > b;
        case AscendC::CMPMODE::EQ:
            return a == b;
        case AscendC::CMPMODE::LE:
            return a <= b;
        case AscendC::CMPMODE::GE:
            return a >= b;
        default:
            return a != b;
    }
}

// Checks that Atlas A2 has a conversion, with this rounding mode.
template <typename D, typename S>
inline void CheckCast(RoundMode mode)
{
    constexpr bool toInteger = kOneOf<D, int16_t, int32_t>;
    const bool five = mode == RoundMode::CAST_RINT || mode == RoundMode::CAST_FLOOR || mode == RoundMode::CAST_CEIL ||
                      mode == RoundMode::CAST_ROUND || mode == RoundMode::CAST_TRUNC;
    const bool none = mode == RoundMode::CAST_NONE;
    bool good = false;
    if constexpr (std::is_same_v<S, half>) {
        good = std::is_same_v<D, float> ? none
               : std::is_same_v<D, uint8_t> ? five || none
               : toInteger && five;
    } else if constexpr (std::is_same_v<S, bfloat16_t>) {
        good = std::is_same_v<D, float> ? none : std::is_same_v<D, int32_t> && five;
    } else if constexpr (std::is_same_v<S, float>) {
        good = std::is_same_v<D, half> ? five || none || mode == RoundMode::CAST_ODD
                                       : (std::is_same_v<D, bfloat16_t> || toInteger) && five;
    } else if constexpr (std::is_same_v<S, uint8_t>) {
        good = std::is_same_v<D, half> && none;
    } else if constexpr (std::is_same_v<S, int32_t>) {
        good = std::is_same_v<D, float> && (five || none);
    }
    Require(good, "cast-table", "this conversion, or its rounding mode, does not exist on the chip");
}

}  // namespace emulation

namespace AscendC {

// -------------------------------------------------------------------------------------------------------- queues

class TPipe;

template <TPosition position, int32_t depth>
class TQue {
public:
    template <typename T>
    LocalTensor<T> AllocTensor()
    {
        Machine& machine = Machine::Get();
        for (uint32_t i = 0; i < count_; ++i) {
            // Buffers are used in turn, as in a ring.
            const uint32_t index = first_ + (next_ + i) % count_;
            if (machine.buffers[index].state == State::Free) {
                next_ = index - first_ + 1;
                machine.Allocate(index);
                return LocalTensor<T>(index, machine.buffers[index].generation, machine.buffers[index].begin);
            }
        }
        Fail("queue", "AllocTensor without a free buffer: the core would hang");
    }

    template <typename T>
    bool EnQue(const LocalTensor<T>& tensor)
    {
        Buffer& buffer = Own(tensor, State::Allocated);
        buffer.state = State::Queued;
        Require(queued_.size() < depth, "queue", "EnQue into a full queue");
        queued_.push_back(tensor.Buffer());
        return true;
    }

    template <typename T>
    LocalTensor<T> DeQue()
    {
        Machine& machine = Machine::Get();
        Require(!queued_.empty(), "queue", "DeQue from an empty queue: the core would hang");
        const uint32_t index = queued_.front();
        queued_.erase(queued_.begin());
        Buffer& buffer = machine.buffers[index];
        machine.Settle(buffer, false);
        buffer.state = State::Dequeued;
        return LocalTensor<T>(index, buffer.generation, buffer.begin);
    }

    template <typename T>
    void FreeTensor(LocalTensor<T>& tensor)
    {
        Buffer& buffer = Own(tensor, State::Dequeued);
        buffer.state = State::Free;
        ++buffer.generation;
    }

private:
    friend class TPipe;

    template <typename T>
    Buffer& Own(const LocalTensor<T>& tensor, State state)
    {
        Machine& machine = Machine::Get();
        const uint32_t index = tensor.Buffer();
        Require(count_ != 0 && index >= first_ && index < first_ + count_, "queue", "a tensor of another queue");
        Buffer& buffer = machine.buffers[index];
        Require(buffer.generation == tensor.Generation(), "queue", "a tensor is used after it was freed");
        Require(buffer.begin == tensor.Begin(), "queue", "a part of a tensor is handed to a queue");
        Require(buffer.state == state, "queue", "EnQue or FreeTensor out of turn");
        return buffer;
    }

    uint32_t first_ = 0;
    uint32_t count_ = 0;
    uint32_t next_ = 0;
    std::vector<uint32_t> queued_;
};

template <TPosition position>
class TBuf {
public:
    template <typename T>
    LocalTensor<T> Get()
    {
        Machine& machine = Machine::Get();
        Require(ready_, "queue", "a TBuf without InitBuffer");
        return LocalTensor<T>(index_, machine.buffers[index_].generation, machine.buffers[index_].begin);
    }

private:
    friend class TPipe;
    uint32_t index_ = 0;
    bool ready_ = false;
};

class TPipe {
public:
    TPipe() { Machine::Get().OpenPipe(); }
    ~TPipe() { Machine::Get().ClosePipe(); }
    TPipe(const TPipe&) = delete;
    TPipe& operator=(const TPipe&) = delete;

    template <TPosition position, int32_t depth>
    bool InitBuffer(TQue<position, depth>& queue, Field<255> number, uint32_t bytes)
    {
        static_assert(position != TPosition::VECCALC, "a queue carries data into or out of UB");
        Require(queue.count_ == 0 && number >= 1, "queue", "InitBuffer twice, or no buffers");
        const Position where = position == TPosition::VECIN ? Position::VecIn : Position::VecOut;
        for (uint32_t i = 0; i < number; ++i) {
            const uint32_t index = Machine::Get().AddBuffer(where, bytes, true);
            queue.first_ = i == 0 ? index : queue.first_;
        }
        queue.count_ = number;
        return true;
    }

    template <TPosition position>
    bool InitBuffer(TBuf<position>& buffer, uint32_t bytes)
    {
        Require(!buffer.ready_, "queue", "InitBuffer twice");
        buffer.index_ = Machine::Get().AddBuffer(Position::VecCalc, bytes, false);
        buffer.ready_ = true;
        return true;
    }
};

// ----------------------------------------------------------------------------------------------------------- DMA

template <typename T>
inline void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& params,
                        const DataCopyPadExtParams<T>& pad)
{
    Require(params.blockCount == 1 && params.srcStride == 0 && params.dstStride == 0, "limits", "not modeled");
    Require(params.rsv == 0, "limits", "a reserved parameter is set");
    Require(params.blockLen > 0 && params.blockLen % sizeof(T) == 0, "limits", "blockLen is no multiple of the type");
    Require(pad.isPad || pad.rightPadding == 0, "limits", "padding with undefined values");
    Require(pad.leftPadding == 0 && pad.rightPadding * sizeof(T) <= 32, "limits", "padding beyond 32 bytes");
    Require(dst.Begin() % emulation::kBlockBytes == 0, "alignment", "DMA into UB is not aligned");
    const uint32_t padding = pad.isPad ? pad.rightPadding * sizeof(T) : 0;
    const uint32_t whole = (params.blockLen + padding + 31) / 32 * 32;
    Machine& machine = Machine::Get();
    machine.CheckHandle(dst.Buffer(), dst.Generation(), {dst.Begin(), whole});
    const Buffer& buffer = machine.buffers[dst.Buffer()];
    Require(buffer.queue && buffer.position == Position::VecIn && buffer.state == State::Allocated, "queue",
            "a load needs a tensor that its VECIN queue has just allocated");
    uint64_t pattern = 0;
    std::memcpy(&pattern, &pad.paddingValue, sizeof(T));
    machine.Issue(dst.Buffer(), Transfer{false, reinterpret_cast<uint8_t*>(src.Address()), dst.Begin(),
                                         params.blockLen, whole, padding, pattern, sizeof(T)});
}

template <typename T>
inline void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& params)
{
    Require(params.blockCount == 1 && params.srcStride == 0 && params.dstStride == 0, "limits", "not modeled");
    Require(params.rsv == 0, "limits", "a reserved parameter is set");
    Require(params.blockLen > 0 && params.blockLen % sizeof(T) == 0, "limits", "blockLen is no multiple of the type");
    Require(src.Begin() % emulation::kBlockBytes == 0, "alignment", "DMA out of UB is not aligned");
    Machine& machine = Machine::Get();
    machine.CheckHandle(src.Buffer(), src.Generation(), {src.Begin(), params.blockLen});
    const Buffer& buffer = machine.buffers[src.Buffer()];
    Require(buffer.queue && buffer.position == Position::VecOut && buffer.state == State::Dequeued, "queue",
            "a store needs a tensor that its VECOUT queue has just given out");
    machine.Issue(src.Buffer(), Transfer{true, reinterpret_cast<uint8_t*>(dst.Address()), src.Begin(),
                                         params.blockLen, 0, 0, 0, sizeof(T)});
}

// -------------------------------------------------------------------------------------------------- vector unit

template <typename T>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalar, int64_t count)
{
    static_assert(emulation::kOneOf<T, half, bfloat16_t, float, int16_t, uint16_t, int32_t, uint32_t>, "type");
    emulation::CheckCount(count);
    emulation::Operand result = emulation::Operand::Of(dst);
    result.Contiguous(static_cast<uint32_t>(count));
    emulation::Access<0>(result, {}, emulation::RepeatsOf(static_cast<uint32_t>(count), sizeof(T)));
    for (uint32_t i = 0; i < count; ++i) {
        emulation::Put<T>(result.begin + i * sizeof(T), scalar);
    }
}

template <typename D, typename S>
inline void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode, uint32_t count)
{
    emulation::CheckCast<D, S>(mode);
    emulation::UnaryCount(dst, src, count, [mode](S v) { return emulation::FromValue<D>(emulation::Value(v), mode); });
}

template <typename D, typename S>
inline void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode, uint64_t mask,
                 Field<255> repeats, const UnaryRepeatParams& params)
{
    emulation::CheckCast<D, S>(mode);
    emulation::UnaryRepeat(dst, src, mask, repeats, params,
                           [mode](S v) { return emulation::FromValue<D>(emulation::Value(v), mode); });
}

template <typename T>
inline void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t count)
{
    static_assert(emulation::kOneOf<T, half, float>, "type");
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    constexpr Bits kSign = sizeof(T) == 4 ? 0x80000000u : 0x8000u;
    emulation::UnaryCount(dst, src, count, [](T v) {
        return emulation::BitCast<T>(static_cast<Bits>(emulation::BitCast<Bits>(v) & static_cast<Bits>(~kSign)));
    });
}

#define EMULATED_SCALAR(name, Function)                                                                           \
    template <typename T>                                                                                         \
    inline void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, int32_t count)        \
    {                                                                                                             \
        static_assert(emulation::kOneOf<T, half, float>, "type");                                                 \
        emulation::UnaryCount(dst, src, count,                                                                    \
                              [scalar](T v) { return emulation::Compute(v, scalar, emulation::Function()); });    \
    }                                                                                                             \
    template <typename T>                                                                                         \
    inline void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask,        \
                     Field<255> repeats, const UnaryRepeatParams& params)                                         \
    {                                                                                                             \
        static_assert(emulation::kOneOf<T, half, float>, "type");                                                 \
        emulation::UnaryRepeat(dst, src, mask, repeats, params,                                                   \
                               [scalar](T v) { return emulation::Compute(v, scalar, emulation::Function()); });   \
    }
EMULATED_SCALAR(Adds, Plus)
EMULATED_SCALAR(Muls, Times)
EMULATED_SCALAR(Mins, Smaller)
#undef EMULATED_SCALAR

#define EMULATED_BINARY(name, Function, ...)                                                                      \
    template <typename T>                                                                                         \
    inline void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,           \
                     int32_t count)                                                                               \
    {                                                                                                             \
        static_assert(emulation::kOneOf<T, __VA_ARGS__>, "type");                                                 \
        emulation::BinaryCount(dst, src0, src1, count,                                                            \
                               [](T a, T b) { return emulation::Compute(a, b, emulation::Function()); });         \
    }                                                                                                             \
    template <typename T>                                                                                         \
    inline void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,           \
                     uint64_t mask, Field<255> repeats, const BinaryRepeatParams& params)                         \
    {                                                                                                             \
        static_assert(emulation::kOneOf<T, __VA_ARGS__>, "type");                                                 \
        emulation::BinaryRepeat(dst, src0, src1, mask, repeats, params,                                           \
                                [](T a, T b) { return emulation::Compute(a, b, emulation::Function()); });        \
    }
EMULATED_BINARY(Add, Plus, half, float, int16_t, int32_t)
EMULATED_BINARY(Sub, Minus, half, float, int16_t, int32_t)
EMULATED_BINARY(Mul, Times, half, float, int16_t, int32_t)
EMULATED_BINARY(Div, Over, half, float)
EMULATED_BINARY(Max, Larger, half, float, int16_t, int32_t)
#undef EMULATED_BINARY

#define EMULATED_LOGIC(name, symbol)                                                                              \
    template <typename T>                                                                                         \
    inline void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,           \
                     uint64_t mask, Field<255> repeats, const BinaryRepeatParams& params)                         \
    {                                                                                                             \
        static_assert(emulation::kOneOf<T, int16_t, uint16_t>, "type");                                           \
        emulation::BinaryRepeat(dst, src0, src1, mask, repeats, params,                                           \
                                [](T a, T b) { return static_cast<T>(a symbol b); });                             \
    }
EMULATED_LOGIC(And, &)
EMULATED_LOGIC(Or, |)
#undef EMULATED_LOGIC

template <typename T>
inline void Not(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count)
{
    static_assert(emulation::kOneOf<T, int16_t, uint16_t>, "type");
    emulation::UnaryCount(dst, src, count, [](T v) { return static_cast<T>(~v); });
}

template <typename T>
inline void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& bits, int32_t count)
{
    static_assert(emulation::kOneOf<T, uint16_t, uint32_t>, "type");
    Require(bits < 8 * sizeof(T), "limits", "a shift by the width of the type or more");
    emulation::UnaryCount(dst, src, count, [bits](T v) { return static_cast<T>(v >> bits); });
}

template <typename T, typename U>
inline void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, T scalar, CMPMODE mode, uint32_t count)
{
    static_assert(std::is_same_v<U, uint8_t> && emulation::kOneOf<T, half, float>, "type");
    emulation::CheckCount(count);
    Require(count * sizeof(T) % emulation::kVectorBytes == 0, "limits", "CompareScalar needs a multiple of 256 bytes");
    emulation::Operand result = emulation::Operand::Of(dst);
    emulation::Operand source = emulation::Operand::Of(src);
    result.Contiguous(count / 8);
    source.Contiguous(count);
    emulation::Access<1>(result, {&source}, emulation::RepeatsOf(count, sizeof(T)));
    for (uint32_t i = 0; i < count; i += 8) {
        uint8_t bits = 0;
        for (uint32_t j = 0; j < 8; ++j) {
            const T value = emulation::At<T>(source.begin + (i + j) * sizeof(T));
            bits |= emulation::Holds(emulation::Value(value), emulation::Value(scalar), mode) ? 1u << j : 0u;
        }
        emulation::Put<uint8_t>(result.begin + i / 8, bits);
    }
}

template <typename T>
inline void Select(const LocalTensor<T>& dst, const LocalTensor<uint8_t>& mask, const LocalTensor<T>& src0, T scalar,
                   SELMODE mode, uint32_t count)
{
    static_assert(emulation::kOneOf<T, half, float>, "type");
    Require(mode == SELMODE::VSEL_TENSOR_SCALAR_MODE, "limits", "this Select takes a scalar");
    emulation::CheckCount(count);
    emulation::Operand result = emulation::Operand::Of(dst);
    emulation::Operand bits = emulation::Operand::Of(mask);
    emulation::Operand source = emulation::Operand::Of(src0);
    result.Contiguous(count);
    bits.Contiguous((count + 7) / 8);
    source.Contiguous(count);
    emulation::Access<2>(result, {&bits, &source}, emulation::RepeatsOf(count, sizeof(T)));
    for (uint32_t i = 0; i < count; ++i) {
        const bool first = emulation::At<uint8_t>(bits.begin + i / 8) >> i % 8 & 1;
        const T value = first ? emulation::At<T>(source.begin + i * sizeof(T)) : scalar;
        emulation::Put<T>(result.begin + i * sizeof(T), value);
    }
}

template <typename T>
inline void Select(const LocalTensor<T>& dst, const LocalTensor<uint8_t>& mask, const LocalTensor<T>& src0,
                   const LocalTensor<T>& src1, SELMODE mode, uint32_t count)
{
    static_assert(emulation::kOneOf<T, half, float>, "type");
    Require(mode == SELMODE::VSEL_TENSOR_TENSOR_MODE, "limits", "mode 0 is not modeled");
    emulation::CheckCount(count);
    emulation::Operand result = emulation::Operand::Of(dst);
    emulation::Operand bits = emulation::Operand::Of(mask);
    emulation::Operand first = emulation::Operand::Of(src0);
    emulation::Operand second = emulation::Operand::Of(src1);
    result.Contiguous(count);
    bits.Contiguous((count + 7) / 8);
    first.Contiguous(count);
    second.Contiguous(count);
    emulation::Access<3>(result, {&bits, &first, &second}, emulation::RepeatsOf(count, sizeof(T)));
    for (uint32_t i = 0; i < count; ++i) {
        const bool chosen = emulation::At<uint8_t>(bits.begin + i / 8) >> i % 8 & 1;
        const uint32_t from = (chosen ? first.begin : second.begin) + i * sizeof(T);
        emulation::Put<T>(result.begin + i * sizeof(T), emulation::At<T>(from));
    }
}

// Sums the active elements of every iteration with a binary tree that adds neighbors; one result per iteration.
template <typename T>
inline void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<128> mask, Field<255> repeats,
                           Field<65535> dstRepStride, Field<65535> srcBlkStride, Field<65535> srcRepStride)
{
    static_assert(emulation::kOneOf<T, half, float>, "type");
    emulation::CheckMask(mask, repeats, sizeof(T));
    emulation::Operand result = emulation::Operand::Of(dst, sizeof(T));
    emulation::Operand source = emulation::Operand::Of(src).Strides(srcBlkStride, srcRepStride);
    for (uint32_t r = 0; r < repeats; ++r) {
        result.Add(result.begin + r * dstRepStride * sizeof(T), sizeof(T));
    }
    source.Iterate(repeats, mask);
    // A result has no block pattern, so that it must not share any byte with the source.
    result.Strides(0, 0);
    emulation::Access<1>(result, {&source}, repeats);
    for (uint32_t r = 0; r < repeats; ++r) {
        T values[emulation::kVectorBytes / sizeof(T)];
        const uint32_t lanes = emulation::Lanes(sizeof(T));
        for (uint32_t e = 0; e < lanes; ++e) {
            values[e] = e < mask ? emulation::At<T>(source.Address(r, e)) : emulation::BitCast<T>(
                std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>(0));
        }
        for (uint32_t width = lanes / 2; width > 0; width /= 2) {
            for (uint32_t e = 0; e < width; ++e) {
                values[e] = emulation::Compute(values[2 * e], values[2 * e + 1], emulation::Plus());
            }
        }
        emulation::Put<T>(result.begin + r * dstRepStride * sizeof(T), values[0]);
    }
}

// Finds the largest active element of every iteration. The documentation requires results to be aligned to twice their
// size, whatever `order` is. It does not mention NaN, so that a NaN is ignored if there is another number.
template <typename T>
inline void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<128> mask, Field<255> repeats,
                           Field<65535> dstRepStride, Field<65535> srcBlkStride, Field<65535> srcRepStride,
                           ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX)
{
    static_assert(emulation::kOneOf<T, half, float>, "type");
    Require(order == ReduceOrder::ORDER_ONLY_VALUE, "limits", "results with an index are not modeled");
    emulation::CheckMask(mask, repeats, sizeof(T));
    emulation::Operand result = emulation::Operand::Of(dst, 2 * sizeof(T));
    emulation::Operand source = emulation::Operand::Of(src).Strides(srcBlkStride, srcRepStride);
    for (uint32_t r = 0; r < repeats; ++r) {
        result.Add(result.begin + r * dstRepStride * sizeof(T), sizeof(T));
    }
    source.Iterate(repeats, mask);
    result.Strides(0, 0);
    emulation::Access<1>(result, {&source}, repeats);
    for (uint32_t r = 0; r < repeats; ++r) {
        T largest = emulation::At<T>(source.Address(r, 0));
        for (uint32_t e = 1; e < mask; ++e) {
            largest = emulation::Compute(largest, emulation::At<T>(source.Address(r, e)), emulation::Larger());
        }
        emulation::Put<T>(result.begin + r * dstRepStride * sizeof(T), largest);
    }
}

// Broadcasts: in each iteration, each of 8 elements fills one 32-byte block.
template <typename T>
inline void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<255> repeats,
                 const BrcbRepeatParams& params)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "type");
    Require(repeats >= 1 && params.dstBlkStride != 0, "limits", "Brcb without iterations or with block stride 0");
    emulation::Operand result = emulation::Operand::Of(dst);
    emulation::Operand source = emulation::Operand::Of(src);
    auto block = [&](uint32_t i) {
        return result.begin + (i / 8 * params.dstRepStride + i % 8 * params.dstBlkStride) * emulation::kBlockBytes;
    };
    for (uint32_t i = 0; i < 8 * repeats; ++i) {
        result.Add(block(i), emulation::kBlockBytes);
    }
    source.Contiguous(8 * repeats);
    result.Strides(0, 0);
    emulation::Access<1>(result, {&source}, repeats);
    for (uint32_t i = 0; i < 8 * repeats; ++i) {
        for (uint32_t j = 0; j < emulation::kBlockBytes / sizeof(T); ++j) {
            emulation::Put<T>(block(i) + j * sizeof(T), emulation::At<T>(source.begin + i * sizeof(T)));
        }
    }
}

}  // namespace AscendC

#ifdef TERNARY_MUTANTS
// The number of the active bug, of those that tests/ascendc/mutants.py writes into the sources; -1 for none.
extern "C" { inline int32_t ternary_mutant = -1; }
#endif
