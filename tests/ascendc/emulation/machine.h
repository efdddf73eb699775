// SPDX-License-Identifier: Apache-2.0
// A model of one vector core of a 910B that checks correctness, not speed: its unified buffer (UB), which unit may
// access which byte of it at which time, the queues that regulate this, DMA transfers in flight, and the global memory
// that the kernel was given. Any misuse ends the run with an error that begins with the name of the check. Written from
// the public API documentation.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace emulation {

struct Error {
    std::string text;
};

[[noreturn]] inline void Fail(const char* check, const std::string& text)
{
    throw Error{std::string("[") + check + "] " + text};
}

inline void Require(bool good, const char* check, const char* text)
{
    if (!good) {
        Fail(check, text);
    }
}

constexpr uint32_t kBlockBytes = 32;
constexpr uint32_t kVectorBytes = 256;
constexpr uint32_t kUnifiedBuffer = 192 * 1024 - 8 * 1024 - 256;
constexpr uint32_t kMaxBuffers = 64;
constexpr uint32_t kMaxQueueBuffersPerPosition = 8;
constexpr uint64_t kRunaway = 200'000;

enum class Timing { Eager, Late };   // when a DMA moves its bytes: at once, or as late as allowed

struct Counters {
    uint64_t readBytes = 0;
    uint64_t writtenBytes = 0;
    uint64_t tableBytes = 0;
    uint64_t dmas = 0;
    uint64_t vectorInstructions = 0;
    uint64_t vectorRepeats = 0;
    uint64_t barriers = 0;
    uint64_t unifiedBufferBytes = 0;
};

// Global memory that the kernel may touch.
struct Region {
    uintptr_t begin;
    uint64_t bytes;
    bool writable;
    std::vector<uint16_t> writer;   // per byte: core + 1, to detect two cores on one byte
    std::vector<uint16_t> reader;   // the same for reads, for weights that are quantized in place
};

constexpr uint16_t kSeveralCores = 0xFFFF;

struct Range {
    uint32_t begin;
    uint32_t bytes;
};

enum class Position { VecIn, VecOut, VecCalc };

enum class State { Free, Allocated, Queued, Dequeued };

struct Transfer {
    bool toGlobal;
    uint8_t* global;
    uint32_t local;
    uint32_t bytes;
    uint32_t paddedBytes;        // written to UB; undefined beyond `bytes + padding`
    uint32_t padding;
    uint64_t paddingPattern;
    uint32_t elementBytes;
};

// One buffer of a queue, or a TBuf (whose state is always Dequeued: the vector unit may use it).
struct Buffer {
    uint32_t begin;
    uint32_t bytes;
    Position position;
    bool queue;
    State state;
    uint32_t generation;
    std::vector<Transfer> pending;
};

class Machine {
public:
    static Machine& Get()
    {
        static Machine machine;
        return machine;
    }

    Timing timing = Timing::Eager;
    uint32_t core = 0;
    uint32_t cores = 1;
    Counters counters;
    std::vector<Region> regions;
    std::vector<Buffer> buffers;
    std::string deferredError;
    uint8_t ub[kUnifiedBuffer];

    void StartCore(uint32_t index);
    void FinishCore();

    // ------------------------------------------------------------------------------------------------ buffers

    void OpenPipe()
    {
        Require(!pipeLive_, "queue", "a second TPipe");
        pipeLive_ = true;
    }

    // Called from a destructor, which must not throw: FinishCore reports the error.
    void ClosePipe() noexcept;

    uint32_t AddBuffer(Position position, uint32_t bytes, bool queue);
    void Allocate(uint32_t index);

    // Completes the transfers of a buffer; with `storesOnly`, a load that is still in flight is an error.
    void Settle(Buffer& buffer, bool storesOnly);

    void SettleAll()
    {
        for (Buffer& buffer : buffers) {
            Settle(buffer, false);
        }
    }

    // ------------------------------------------------------------------------------------------------- access

    void CheckHandle(uint32_t index, uint32_t generation, Range range) const;

    void CheckVectorAccess(uint32_t index) const
    {
        const Buffer& buffer = buffers[index];
        if (!buffer.queue) {
            return;
        }
        const State allowed = buffer.position == Position::VecIn ? State::Dequeued : State::Allocated;
        Require(buffer.state == allowed, "queue", "the vector unit does not own this queue tensor now");
    }

    // Starts a vector instruction, with a new stamp for its own writes.
    void BeginInstruction(uint64_t repeats)
    {
        ++counters.vectorInstructions;
        counters.vectorRepeats += repeats;
        Require(++instruction_ < kRunaway, "limits", "runaway kernel");
    }

    void CheckRead(Range range) const;
    void CheckWrite(Range range);

    // Returns whether this source shares bytes with the results; called after CheckWrite of all results.
    bool Overlaps(Range range) const;
    void MarkRead(Range range);
    void MarkWrite(Range range);

    void Barrier()
    {
        ++epoch_;
        ++counters.barriers;
    }

    // ------------------------------------------------------------------------------------------ global memory

    void CheckGlobal(uintptr_t address, uint64_t bytes, bool write);
    void Issue(uint32_t index, const Transfer& transfer);

private:
    void Poison(const Buffer& buffer);
    void Move(const Transfer& t);

    uint8_t defined_[kUnifiedBuffer];
    uint32_t wrote_[kUnifiedBuffer];
    uint32_t read_[kUnifiedBuffer];
    uint32_t touched_[kUnifiedBuffer];
    uint32_t epoch_ = 1;
    uint32_t instruction_ = 0;
    uint32_t used_ = 0;
    uint32_t queueBuffers_[3] = {0, 0, 0};
    bool pipeLive_ = false;
};

}  // namespace emulation
