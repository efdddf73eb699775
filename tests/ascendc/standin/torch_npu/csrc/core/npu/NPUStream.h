// SPDX-License-Identifier: Apache-2.0
// The part of torch_npu's stream that the binding uses. device.cpp implements it.
#pragma once

#include <c10/core/Stream.h>

#include "acl/acl.h"

namespace c10_npu {

class NPUStream {
public:
    explicit NPUStream(c10::Stream stream) : stream_(stream) {}
    c10::Stream unwrap() const { return stream_; }
    // If `wait` is true, which is what torch_npu's overload without an argument does, torch_npu waits until its task
    // queue is empty.
    aclrtStream stream(const bool wait) const;

private:
    c10::Stream stream_;
};

NPUStream getCurrentNPUStream(c10::DeviceIndex device);

}  // namespace c10_npu
