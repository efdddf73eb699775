// SPDX-License-Identifier: Apache-2.0
// A device that is host memory: two of them, with streams, a caching allocator and pinned memory, as far as the binding
// goes. The kernels run in the emulation. What tests ask it, for ctypes.
#pragma once

#include <cstdint>

extern "C" {

struct StandinCounts {
    uint64_t uploads;           // copies of int32 from the host: the tables
    uint64_t waitingUploads;    // of these, those that the host waited for: blocking, or not from pinned memory
    uint64_t launches;
    uint64_t strayLaunches;     // while another device than the table's was the current one, or on another stream
    uint64_t strayUploads;      // while a graph was being captured
    uint64_t queueWaits;
    uint64_t blocks;            // of device memory, in use
};

void standin_counts(StandinCounts* counts);

// The current stream of the current device.
void standin_set_stream(int64_t stream);
// What the runtime says of every stream: 0, or an aclError; is a graph being captured?
void standin_set_capture(int32_t status, int32_t capturing);
// The status of all launches from now on; one that is not 0 computes nothing. With `compute` 0, none does.
void standin_set_launches(uint32_t status, int32_t compute);
}
