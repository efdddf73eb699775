// SPDX-License-Identifier: Apache-2.0
// This is a unit of its own that is compiled with full optimization, because its loops over bytes take most of the
// time.
#include "machine.h"

#include <algorithm>

namespace emulation {
namespace {

bool Contains(const uint32_t* stamps, Range range, uint32_t stamp)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < range.bytes; ++i) {
        found |= static_cast<uint32_t>(stamps[range.begin + i] == stamp);
    }
    return found != 0;
}

}  // namespace

void Machine::CheckRead(Range range) const
{
    Require(std::memchr(defined_ + range.begin, 0, range.bytes) == nullptr, "poison", "undefined bytes are read");
    Require(!Contains(wrote_, range, epoch_), "hazard", "no PipeBarrier between a vector write and a vector read");
}

void Machine::CheckWrite(Range range)
{
    Require(!Contains(wrote_, range, epoch_) && !Contains(read_, range, epoch_), "hazard",
            "no PipeBarrier between a vector access and a vector write");
    Require(!Contains(touched_, range, instruction_), "overlap", "an instruction writes a byte twice");
    std::fill_n(touched_ + range.begin, range.bytes, instruction_);
}

bool Machine::Overlaps(Range range) const
{
    return Contains(touched_, range, instruction_);
}

void Machine::MarkRead(Range range)
{
    std::fill_n(read_ + range.begin, range.bytes, epoch_);
}

void Machine::MarkWrite(Range range)
{
    std::fill_n(wrote_ + range.begin, range.bytes, epoch_);
    std::memset(defined_ + range.begin, 1, range.bytes);
}

void Machine::CheckGlobal(uintptr_t address, uint64_t bytes, bool write)
{
    for (Region& region : regions) {
        if (address < region.begin || address - region.begin >= region.bytes) {
            continue;
        }
        const uint64_t offset = address - region.begin;
        Require(bytes <= region.bytes - offset, "gm-bounds", "access beyond the end of a global tensor");
        Require(!write || region.writable, "gm-bounds", "a store to a read-only global tensor");
        if (write) {
            for (uint64_t i = offset; i < offset + bytes; ++i) {
                Require(region.writer[i] == 0, "gm-bounds", "a global byte is stored twice");
                Require(region.reader[i] == 0 || region.reader[i] == core + 1, "gm-bounds",
                        "a global byte is stored by another core than the one that reads it");
                region.writer[i] = static_cast<uint16_t>(core + 1);
            }
        } else if (region.writable) {
            for (uint64_t i = offset; i < offset + bytes; ++i) {
                Require(region.writer[i] == 0, "gm-bounds", "a global byte is read after it was stored");
                region.reader[i] = region.reader[i] == 0 || region.reader[i] == core + 1
                                       ? static_cast<uint16_t>(core + 1) : kSeveralCores;
            }
        }
        return;
    }
    Fail("gm-bounds", "access outside every global tensor");
}

void Machine::Issue(uint32_t index, const Transfer& transfer)
{
    Buffer& buffer = buffers[index];
    const uint32_t bytes = transfer.toGlobal ? transfer.bytes : transfer.paddedBytes;
    for (const Transfer& other : buffer.pending) {
        const uint32_t otherBytes = other.toGlobal ? other.bytes : other.paddedBytes;
        const bool apart = transfer.local + bytes <= other.local || other.local + otherBytes <= transfer.local;
        Require(apart || (transfer.toGlobal && other.toGlobal), "dma", "two transfers in flight on the same bytes");
    }
    ++counters.dmas;
    (transfer.toGlobal ? counters.writtenBytes : counters.readBytes) += transfer.bytes;
    CheckGlobal(reinterpret_cast<uintptr_t>(transfer.global), transfer.bytes, transfer.toGlobal);
    if (transfer.toGlobal) {
        Require(std::memchr(defined_ + transfer.local, 0, transfer.bytes) == nullptr, "poison",
                "undefined bytes are stored to global memory");
    }
    if (timing == Timing::Eager) {
        Move(transfer);
    }
    buffer.pending.push_back(transfer);
}

void Machine::Poison(const Buffer& buffer)
{
    std::memset(ub + buffer.begin, 0xFF, buffer.bytes);
    std::memset(defined_ + buffer.begin, 0, buffer.bytes);
    // The queue's events order this use of the buffer after the previous one.
    std::fill_n(wrote_ + buffer.begin, buffer.bytes, 0);
    std::fill_n(read_ + buffer.begin, buffer.bytes, 0);
}

void Machine::Move(const Transfer& t)
{
    if (t.toGlobal) {
        std::memcpy(t.global, ub + t.local, t.bytes);
        return;
    }
    std::memcpy(ub + t.local, t.global, t.bytes);
    std::memset(defined_ + t.local, 1, t.bytes);
    for (uint32_t i = t.bytes; i < t.bytes + t.padding; i += t.elementBytes) {
        std::memcpy(ub + t.local + i, &t.paddingPattern, t.elementBytes);
        std::memset(defined_ + t.local + i, 1, t.elementBytes);
    }
}

void Machine::StartCore(uint32_t index)
{
    core = index;
    std::memset(ub, 0xFF, sizeof(ub));   // NaN in every float format
    std::memset(defined_, 0, sizeof(defined_));
    std::memset(wrote_, 0, sizeof(wrote_));
    std::memset(read_, 0, sizeof(read_));
    std::memset(touched_, 0, sizeof(touched_));
    epoch_ = 1;
    instruction_ = 0;
    used_ = 0;
    buffers.clear();
    pipeLive_ = false;
    queueBuffers_[0] = queueBuffers_[1] = queueBuffers_[2] = 0;
}

void Machine::FinishCore()
{
    if (!deferredError.empty()) {
        throw Error{deferredError};
    }
    Require(!pipeLive_, "queue", "the TPipe outlives the kernel");
    counters.unifiedBufferBytes = std::max<uint64_t>(counters.unifiedBufferBytes, used_);
}

void Machine::ClosePipe() noexcept
{
    pipeLive_ = false;
    try {
        for (Buffer& buffer : buffers) {
            Settle(buffer, false);
            Require(!buffer.queue || buffer.state == State::Free, "queue", "a tensor was never freed");
            Require(buffer.pending.empty(), "queue", "a load that nobody waited for");
        }
    } catch (const Error& error) {
        deferredError = error.text;
    }
}

uint32_t Machine::AddBuffer(Position position, uint32_t bytes, bool queue)
{
    Require(pipeLive_, "queue", "InitBuffer without a TPipe");
    Require(bytes > 0, "ub-capacity", "a buffer of no bytes");
    bytes = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    Require(bytes <= kUnifiedBuffer - used_, "ub-capacity", "the unified buffer is full");
    Require(buffers.size() < kMaxBuffers, "ub-capacity", "more than 64 buffers");
    if (queue) {
        Require(++queueBuffers_[static_cast<int>(position)] <= kMaxQueueBuffersPerPosition, "queue",
                "more than 8 queue buffers at one position: no event left");
    }
    buffers.push_back({used_, bytes, position, queue, queue ? State::Free : State::Dequeued, 0, {}});
    used_ += bytes;
    return static_cast<uint32_t>(buffers.size() - 1);
}

void Machine::Allocate(uint32_t index)
{
    Buffer& buffer = buffers[index];
    Settle(buffer, true);
    buffer.state = State::Allocated;
    ++buffer.generation;
    Poison(buffer);
}

void Machine::Settle(Buffer& buffer, bool storesOnly)
{
    std::vector<Transfer> left;
    for (const Transfer& transfer : buffer.pending) {
        if (!transfer.toGlobal && storesOnly) {
            left.push_back(transfer);
        } else if (timing == Timing::Late) {
            Move(transfer);
        }
    }
    Require(left.empty(), "queue", "a load that nobody waited for");
    buffer.pending.clear();
}

void Machine::CheckHandle(uint32_t index, uint32_t generation, Range range) const
{
    Require(index < buffers.size(), "queue", "a tensor that no queue or TBuf gave out");
    const Buffer& buffer = buffers[index];
    Require(buffer.generation == generation, "queue", "a tensor is used after it was freed");
    Require(range.begin >= buffer.begin && range.bytes <= buffer.bytes &&
                range.begin - buffer.begin <= buffer.bytes - range.bytes,
            "ub-bounds", "access beyond the end of a buffer");
}

}  // namespace emulation
