// SPDX-License-Identifier: Apache-2.0
// The storage types half and bfloat16_t, and conversions with every rounding mode of the Cast instruction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };

}  // namespace AscendC

namespace emulation {

using AscendC::RoundMode;

template <typename To, typename From>
inline To BitCast(From value)
{
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &value, sizeof(to));
    return to;
}

inline double RoundToInteger(double value, RoundMode mode)
{
    switch (mode) {
        case RoundMode::CAST_FLOOR:
            return std::floor(value);
        case RoundMode::CAST_CEIL:
            return std::ceil(value);
        case RoundMode::CAST_ROUND:
            return std::round(value);
        case RoundMode::CAST_TRUNC:
            return std::trunc(value);
        case RoundMode::CAST_ODD: {
            const double down = std::trunc(value);
            if (down == value || std::fmod(down, 2.0) != 0.0) {
                return down;
            }
            return down + std::copysign(1.0, value);
        }
        default:
            return std::nearbyint(value);
    }
}

// Returns the bit pattern of a value in a binary format with `mantissa` stored mantissa bits and `exponentBits` bits of
// exponent.
inline uint16_t Encode(double value, int mantissa, int exponentBits, RoundMode mode)
{
    const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
    const uint16_t infinity = static_cast<uint16_t>(((1u << exponentBits) - 1u) << mantissa);
    if (std::isnan(value)) {
        return static_cast<uint16_t>(infinity | (1u << (mantissa - 1)));
    }
    if (std::isinf(value)) {
        return static_cast<uint16_t>(sign | infinity);
    }
    const int bias = (1 << (exponentBits - 1)) - 1;
    int exponent = 0;
    std::frexp(value, &exponent);
    exponent = std::max(exponent - 1, 1 - bias);
    const double rounded = RoundToInteger(std::ldexp(value, mantissa - exponent), mode);
    const double result = std::ldexp(std::fabs(rounded), exponent - mantissa);
    if (result == 0.0) {
        return sign;
    }
    std::frexp(result, &exponent);
    exponent -= 1;
    if (exponent > bias) {
        return static_cast<uint16_t>(sign | infinity);
    }
    if (exponent < 1 - bias) {
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(result, mantissa + bias - 1)));
    }
    const double fraction = std::ldexp(result, mantissa - exponent) - std::ldexp(1.0, mantissa);
    const uint32_t bits = (static_cast<uint32_t>(exponent + bias) << mantissa) + static_cast<uint32_t>(fraction);
    return static_cast<uint16_t>(sign | bits);
}

inline double Decode(uint16_t bits, int mantissa, int exponentBits)
{
    const int bias = (1 << (exponentBits - 1)) - 1;
    const int exponent = (bits & 0x7FFF) >> mantissa;
    const int fraction = bits & ((1 << mantissa) - 1);
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == (1 << exponentBits) - 1) {
        return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) {
        return sign * std::ldexp(fraction, 1 - bias - mantissa);
    }
    return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

inline double DecodeHalf(uint16_t bits)
{
    static const std::vector<double> kValues = [] {
        std::vector<double> values(65536);
        for (uint32_t i = 0; i < values.size(); ++i) {
            values[i] = Decode(static_cast<uint16_t>(i), 10, 5);
        }
        return values;
    }();
    return kValues[bits];
}

// Encodes small integers, such as codes and counts, from a table, because Encode is slow.
inline uint16_t EncodeHalf(double value, RoundMode mode)
{
    static const std::vector<uint16_t> kIntegers = [] {
        std::vector<uint16_t> bits(513);
        for (int i = -256; i <= 256; ++i) {
            bits[i + 256] = Encode(i, 10, 5, RoundMode::CAST_RINT);
        }
        return bits;
    }();
    const bool small = value >= -256.0 && value <= 256.0 && value == static_cast<int>(value);
    if (small && (value != 0.0 || !std::signbit(value))) {
        return kIntegers[static_cast<int>(value) + 256];
    }
    return Encode(value, 10, 5, mode);
}

}  // namespace emulation

// These types have no arithmetic, so that a kernel that computes with them does not compile.
struct half {
    uint16_t bits;
    half() = default;
    explicit half(float value) : bits(emulation::EncodeHalf(value, emulation::RoundMode::CAST_RINT)) {}
    float Float() const { return static_cast<float>(emulation::DecodeHalf(bits)); }
};

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) : bits(emulation::Encode(value, 7, 8, emulation::RoundMode::CAST_RINT)) {}
    float Float() const { return emulation::BitCast<float>(static_cast<uint32_t>(bits) << 16); }
};

namespace emulation {

// The values that the vector unit computes with: a double holds every sum and product of two halves, and every float,
// exactly.
inline double Value(float value) { return value; }
inline double Value(half value) { return DecodeHalf(value.bits); }
inline double Value(bfloat16_t value) { return value.Float(); }
inline double Value(int32_t value) { return value; }
inline double Value(int16_t value) { return value; }
inline double Value(uint16_t value) { return value; }
inline double Value(uint8_t value) { return value; }

// Converts to an integer and saturates, as is documented for conversions to integers.
template <typename Integer>
inline Integer ToInteger(double value, RoundMode mode)
{
    const double rounded = std::isnan(value) ? 0.0 : RoundToInteger(value, mode);
    const double low = std::numeric_limits<Integer>::min();
    const double high = std::numeric_limits<Integer>::max();
    return static_cast<Integer>(rounded < low ? low : rounded > high ? high : rounded);
}

template <typename T>
inline T FromValue(double value, RoundMode mode);
template <>
inline float FromValue<float>(double value, RoundMode)
{
    return static_cast<float>(value);
}
template <>
inline half FromValue<half>(double value, RoundMode mode)
{
    half h;
    h.bits = EncodeHalf(value, mode);
    return h;
}
template <>
inline bfloat16_t FromValue<bfloat16_t>(double value, RoundMode mode)
{
    bfloat16_t b;
    b.bits = Encode(value, 7, 8, mode);
    return b;
}
template <>
inline int32_t FromValue<int32_t>(double value, RoundMode mode)
{
    return ToInteger<int32_t>(value, mode);
}
template <>
inline int16_t FromValue<int16_t>(double value, RoundMode mode)
{
    return ToInteger<int16_t>(value, mode);
}
template <>
inline uint16_t FromValue<uint16_t>(double value, RoundMode mode)
{
    return ToInteger<uint16_t>(value, mode);
}
template <>
inline uint8_t FromValue<uint8_t>(double value, RoundMode mode)
{
    return ToInteger<uint8_t>(value, mode);
}

}  // namespace emulation
