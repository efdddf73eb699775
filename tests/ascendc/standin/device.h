// SPDX-License-Identifier: Apache-2.0
// The interface, for ctypes, of a stand-in for an NPU: two devices in host memory, with what the binding uses of
// streams, a caching allocator and pinned memory. The kernels run in the emulation.
#pragma once

#include <cstdint>

extern "C" {

struct StandinCounts {
    uint64_t uploads;           // copies of int32 tensors from the host, which are the tables
    uint64_t waitingUploads;    // those that the host waited for: blocking, or not from pinned memory
    uint64_t launches;
    uint64_t strayLaunches;     // while the table's device was not current, or on another than its current stream
    uint64_t strayUploads;      // uploads while a graph was being captured
    uint64_t queueWaits;
    uint64_t blocks;            // blocks of device memory in use
};

void standin_counts(StandinCounts* counts);

// Sets the current stream of the current device.
void standin_set_stream(int64_t stream);
// Sets what the runtime answers for every stream: a status (0 or an aclError), and whether a graph is being captured.
void standin_set_capture(int32_t status, int32_t capturing);
// Sets the status of all following launches; with a status other than 0, or with `compute` 0, they compute nothing.
void standin_set_launches(uint32_t status, int32_t compute);
}
