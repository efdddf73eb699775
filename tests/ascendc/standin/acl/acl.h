// SPDX-License-Identifier: Apache-2.0
// The part of CANN's runtime that the binding calls, for g++ on a CPU. device.cpp implements it. Written from the
// public documentation.
#pragma once

#include <cstdint>

using aclError = int;
using aclrtStream = void*;
using aclmdlRI = void*;

constexpr aclError ACL_SUCCESS = 0;
constexpr aclError ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207000;

enum aclDeviceInfo { ACL_DEVICE_INFO_AI_CORE_NUM = 0, ACL_DEVICE_INFO_VECTOR_CORE_NUM = 1 };

enum aclmdlRICaptureStatus {
    ACL_MODEL_RI_CAPTURE_STATUS_NONE = 0,
    ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE,
    ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED,
};

extern "C" {
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo which, int64_t* value);
aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status, aclmdlRI* graph);
}
