// SPDX-License-Identifier: Apache-2.0
//
// Conversion of fp32 and bf16 numbers to and from their bits.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    if (isnan(value)) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
