// SPDX-License-Identifier: Apache-2.0
//
// bitcpm::fake_quantize on a CPU: each group of a latent weight is read once from memory and written once, in place or
// elsewhere.
//
// The arithmetic is that of bitcpm_megatron/quantization/quantizer.py bit for bit. The statistic of a scale is the mean
// of |w|, summed in fp32 as one binary tree over neighbors and divided by n, or the largest |w|. It is multiplied by
// the multiplier, raised to at least eps, and rounded to bf16. In the ternary space, under a scale s, w becomes +-s if
// |w| > s / 2, else +0.0. Magnitudes of floating-point numbers are ordered like their bits as integers, so that
// threshold and selection need no conversion of the weight. In other spaces w takes the level above the last threshold
// that it is beyond.
//
// Compile with -ffp-contract=off and without -ffast-math.

#include <math.h>
#include <stdint.h>

#include "bits.h"

enum { BF16 = 0, FP16 = 1, FP32 = 2 };
enum { THRESHOLDS = 4 };  // the largest number of thresholds of a space

// A quantizer. The levels and thresholds of a space are those of quantization/spaces.py; ternary has code of its own
// and leaves them empty.
typedef struct {
    float eps;
    float multiplier;
    int32_t absmax;  // whether the statistic is the largest magnitude, else the mean
    int32_t count;   // the number of thresholds, 0 for ternary
    float levels[THRESHOLDS + 1];
    float thresholds[THRESHOLDS];
    int32_t upper[THRESHOLDS];  // whether a tie goes to the upper level
} Quantizer;
enum { PREFETCHED = 256 };  // smallest group, in elements, for which prefetching pays off

// Converts an fp16 magnitude (without sign bit) to fp32, exactly and without denormal fp32 intermediates.
static inline float from_fp16(uint32_t magnitude) {
    const uint32_t shifted = magnitude << 13;
    const float normal = as_float(shifted + (112u << 23));
    const float denormal = as_float(shifted + (113u << 23)) - 0x1p-14f;
    const float special = as_float(shifted | 0x7f800000u);
    return magnitude < 0x400 ? denormal : magnitude < 0x7c00 ? normal : special;
}

// Converts an fp32 magnitude to fp16 bits, rounding to nearest even, or down (toward zero) for a threshold.
static uint16_t to_fp16(float value, int down) {
    const uint32_t bits = as_bits(value);
    const int exponent = (int)(bits >> 23) - 127;
    if (isnan(value)) return 0x7e00;
    if (exponent > 15) return down && !isinf(value) ? 0x7bff : 0x7c00;
    const int dropped = exponent < -14 ? 13 - 14 - exponent : 13;  // below exponent -14 the result is denormal
    if (dropped > 24) return 0;
    const uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
    uint32_t kept = mantissa >> dropped;
    const uint32_t rest = mantissa & ((1u << dropped) - 1), half = 1u << (dropped - 1);
    if (!down && (rest > half || (rest == half && (kept & 1)))) kept += 1;
    // The leading one adds 1 to the exponent field; a carry of the rounding adds another 1.
    return (uint16_t)(exponent < -14 ? kept : kept + ((uint32_t)(exponent + 14) << 10));
}

#define MAGNITUDE_BF16(bits) as_float((uint32_t)((bits) & 0x7fff) << 16)
#define MAGNITUDE_FP16(bits) from_fp16((bits) & 0x7fffu)
#define MAGNITUDE_FP32(bits) as_float((bits) & 0x7fffffffu)

// Computes one level of the tree: sums of neighbors, and the last element itself if n is odd.
static inline void add_neighbors(const float *restrict x, float *restrict sums, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) sums[i] = x[2 * i] + x[2 * i + 1];
    if (n % 2) sums[n / 2] = x[n - 1];
}

static inline float tree(float *x, float *y, int64_t n) {
    while (n > 1) {
        add_neighbors(x, y, n);
        n = (n + 1) / 2;
        float *sums = y;
        y = x, x = sums;
    }
    return x[0];
}

// Defines the sum of the magnitudes of a group; the first level of the tree reads the weight directly.
#define DEFINE_SUM(name, word, magnitude)                                                             \
    static inline float name(const word *restrict w, float *restrict scratch, int64_t n) {            \
        for (int64_t i = 0; i < n / 2; i++) scratch[i] = magnitude(w[2 * i]) + magnitude(w[2 * i + 1]); \
        if (n % 2) scratch[n / 2] = magnitude(w[n - 1]);                                              \
        return tree(scratch, scratch + (n + 1) / 2, (n + 1) / 2);                                     \
    }

// Defines the bits of the largest magnitude of a group; as an integer, NaN is larger than infinity.
#define DEFINE_LARGEST(name, word, magnitude_bits)             \
    static inline word name(const word *w, int64_t n) {        \
        word largest = 0;                                      \
        for (int64_t i = 0; i < n; i++) {                      \
            const word bits = w[i] & (word)(magnitude_bits);   \
            largest = bits > largest ? bits : largest;         \
        }                                                      \
        return largest;                                        \
    }

DEFINE_LARGEST(largest_16, uint16_t, 0x7fff)
DEFINE_LARGEST(largest_32, uint32_t, 0x7fffffff)

DEFINE_SUM(sum_bf16, uint16_t, MAGNITUDE_BF16)
DEFINE_SUM(sum_fp16, uint16_t, MAGNITUDE_FP16)
DEFINE_SUM(sum_fp32, uint32_t, MAGNITUDE_FP32)

// A weight beyond the threshold keeps its sign and takes the magnitude `level`; NaN stays NaN. `out` is `w` itself or
// does not overlap with it: the iterations are independent, which the pragma tells the compiler.
#define DEFINE_SELECT(name, word, sign_bit, infinity, nan)                                                    \
    static inline void name(const word *w, word *out, int64_t n, word threshold, word level) {                \
        _Pragma("omp simd")                                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                                     \
            const word magnitude = w[i] & (word)~(word)(sign_bit);                                            \
            const word signed_level = level ? (word)(level | (w[i] & (word)(sign_bit))) : (word)0;            \
            const word chosen = magnitude > threshold ? signed_level : (word)0;                               \
            out[i] = magnitude > (word)(infinity) ? (word)(nan) : chosen;                                     \
        }                                                                                                     \
    }

DEFINE_SELECT(select_bf16, uint16_t, 0x8000, 0x7f80, 0x7fc0)
DEFINE_SELECT(select_fp16, uint16_t, 0x8000, 0x7c00, 0x7e00)
DEFINE_SELECT(select_fp32, uint32_t, 0x80000000u, 0x7f800000u, 0x7fc00000u)

// Handles scales that training never makes (zero, negative, denormal, infinite or NaN) by the reference's division.
static void by_division(const void *weight, void *quantized, int64_t n, int dtype, float s) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = dtype == FP32 ? ((const uint32_t *)weight)[i] : ((const uint16_t *)weight)[i];
        float w;
        if (dtype == FP32) w = as_float(bits);
        else if (dtype == BF16) w = as_float(bits << 16);
        else w = bits & 0x8000 ? -from_fp16(bits & 0x7fff) : from_fp16(bits & 0x7fff);
        float code = rintf(w / s);
        code = code < -1.0f ? -1.0f : code > 1.0f ? 1.0f : code;
        const float value = code * s + 0.0f;
        const float magnitude = fabsf(value);
        const uint32_t sign = value < 0.0f;
        if (dtype == FP32) ((uint32_t *)quantized)[i] = as_bits(value);
        else {
            const uint16_t rounded = dtype == BF16 ? to_bf16(magnitude) : to_fp16(magnitude, 0);
            ((uint16_t *)quantized)[i] = rounded ? (uint16_t)(rounded | sign << 15) : 0;
        }
    }
}

// The words that represent the levels of a group, and the smallest value that is beyond each threshold.
typedef struct {
    uint32_t words[THRESHOLDS + 1];
    float bounds[THRESHOLDS];
    uint32_t nan;
} Levels;

static uint32_t stored(float value, int dtype) {
    if (dtype == FP32) return as_bits(value);
    const uint16_t magnitude = dtype == BF16 ? to_bf16(fabsf(value)) : to_fp16(fabsf(value), 0);
    return magnitude && value < 0.0f ? magnitude | 0x8000u : magnitude;
}

static Levels levels_under(const Quantizer *quantizer, float s, int dtype) {
    Levels made;
    made.nan = dtype == FP32 ? 0x7fc00000u : dtype == BF16 ? 0x7fc0u : 0x7e00u;
    for (int k = 0; k <= THRESHOLDS; k++) {
        const float value = k <= quantizer->count ? quantizer->levels[k] * s + 0.0f : 0.0f;
        made.words[k] = isfinite(s) ? stored(value, dtype) : made.nan;
    }
    for (int k = 0; k < THRESHOLDS; k++) {
        const float bound = quantizer->thresholds[k] * s;
        // If a tie goes to the lower level, a value beyond the bound is at least the next larger number. No value is
        // beyond infinity, and an unused threshold has no level above it: both get NaN, which nothing reaches.
        if (k >= quantizer->count || (!quantizer->upper[k] && bound == INFINITY)) made.bounds[k] = NAN;
        else made.bounds[k] = quantizer->upper[k] ? bound : nextafterf(bound, INFINITY);
    }
    return made;
}

static inline float from_fp16_signed(uint32_t bits) {
    return as_float(as_bits(from_fp16(bits & 0x7fff)) | (bits & 0x8000) << 16);
}

#define VALUE_BF16(bits) as_float((uint32_t)(bits) << 16)
#define VALUE_FP16(bits) from_fp16_signed(bits)
#define VALUE_FP32(bits) as_float(bits)

#define DEFINE_LEVELS(name, word, value_of)                                                   \
    static inline void name(const word *w, word *out, int64_t n, const Levels *levels) {      \
        word words[THRESHOLDS + 1];                                                           \
        for (int k = 0; k <= THRESHOLDS; k++) words[k] = (word)levels->words[k];              \
        const word nan = (word)levels->nan;                                                   \
        const float a = levels->bounds[0], b = levels->bounds[1], c = levels->bounds[2], d = levels->bounds[3]; \
        _Pragma("omp simd")                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                     \
            const float value = value_of(w[i]);                                               \
            word chosen = value >= a ? words[1] : words[0];                                   \
            chosen = value >= b ? words[2] : chosen;                                          \
            chosen = value >= c ? words[3] : chosen;                                          \
            chosen = value >= d ? words[4] : chosen;                                          \
            out[i] = value == value ? chosen : nan;                                           \
        }                                                                                     \
    }

DEFINE_LEVELS(levels_bf16, uint16_t, VALUE_BF16)
DEFINE_LEVELS(levels_fp16, uint16_t, VALUE_FP16)
DEFINE_LEVELS(levels_fp32, uint32_t, VALUE_FP32)

static inline float statistic(const void *w, float *scratch, int64_t n, int dtype, int absmax) {
    if (absmax) {
        if (dtype == FP32) return as_float(largest_32(w, n));
        const uint16_t largest = largest_16(w, n);
        return dtype == BF16 ? MAGNITUDE_BF16(largest) : MAGNITUDE_FP16(largest);
    }
    const float sum = dtype == BF16   ? sum_bf16(w, scratch, n)
                      : dtype == FP16 ? sum_fp16(w, scratch, n)
                                      : sum_fp32(w, scratch, n);
    return sum / (float)n;
}

static inline __attribute__((always_inline)) void one_group(const void *w, void *out, uint16_t *scale, float *scratch,
                                                            int64_t n, int dtype, int given,
                                                            const Quantizer *quantizer) {
    if (!given) {
        const float found = statistic(w, scratch, n, dtype, quantizer->absmax) * quantizer->multiplier;
        *scale = to_bf16(found < quantizer->eps ? quantizer->eps : found);  // NaN stays NaN
    }
    const float s = as_float((uint32_t)*scale << 16);
    if (quantizer->count) {
        const Levels levels = levels_under(quantizer, s, dtype);
        if (dtype == BF16) levels_bf16(w, out, n, &levels);
        else if (dtype == FP16) levels_fp16(w, out, n, &levels);
        else levels_fp32(w, out, n, &levels);
    } else if (!(s >= 0x1p-124f && s < INFINITY)) by_division(w, out, n, dtype, s);
    else if (dtype == BF16) select_bf16(w, out, n, to_bf16(s / 2), *scale);
    else if (dtype == FP16) select_fp16(w, out, n, to_fp16(s / 2, 1), to_fp16(s, 0));
    else select_fp32(w, out, n, as_bits(s / 2), as_bits(s));
}

// A weight of one call, in five words of 64 bits: contiguous [groups, n] in the call's dtype, with one bf16 scale per
// group.
typedef struct {
    const void *latent;
    void *quantized;  // `latent` itself, or memory that does not overlap with it
    uint16_t *scales;
    int64_t groups;
    int64_t n;
} Weight;

// Returns the first group that begins at or after an element, which is counted from the weight's first element.
static inline int64_t group_from(const Weight *weight, int64_t element) {
    if (element <= 0) return 0;
    const int64_t group = (element + weight->n - 1) / weight->n;
    return group < weight->groups ? group : weight->groups;
}

// Quantizes neighboring groups of n elements. If n and dtype are constants, the compiler unrolls the work per group.
static inline __attribute__((always_inline)) void groups_of(const char *w, char *out, uint16_t *scale, int64_t count,
                                                            float *scratch, int64_t n, int dtype, int given,
                                                            const Quantizer *quantizer) {
    const int64_t bytes = n * (dtype == FP32 ? 4 : 2);
    for (int64_t g = 0; g < count; g++, w += bytes, out += bytes, scale++) {
        // The next group is loaded while this one is being computed.
        if (n >= PREFETCHED)
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(w + bytes + i);
        one_group(w, out, scale, scratch, n, dtype, given, quantizer);
    }
}

// Ternary with the mean itself, for one dtype and group size, or (0) for any. The constants remove unused branches,
// which would cost time in small groups. They are separate functions, so that the compiled code of each does not depend
// on the others.
#define DEFINE_USUAL(name, elements, type)                                                                     \
    static __attribute__((noinline)) void name(const char *w, char *out, uint16_t *scale, int64_t count,       \
                                               float *scratch, int64_t n, int dtype, int given, float eps) {   \
        const Quantizer usual = {.eps = eps, .multiplier = 1.0f, .absmax = 0, .count = 0};                     \
        groups_of(w, out, scale, count, scratch, elements ? elements : n, elements ? type : dtype, given, &usual); \
    }

DEFINE_USUAL(bf16_by_32, 32, BF16)
DEFINE_USUAL(bf16_by_64, 64, BF16)
DEFINE_USUAL(bf16_by_128, 128, BF16)
DEFINE_USUAL(fp32_by_32, 32, FP32)
DEFINE_USUAL(by_any, 0, 0)

static void some_groups(const Weight *weight, int64_t first, int64_t last, float *scratch, int dtype, int given,
                        const Quantizer *quantizer) {
    const int64_t n = weight->n, count = last - first, offset = first * n * (dtype == FP32 ? 4 : 2);
    const char *w = (const char *)weight->latent + offset;
    char *out = (char *)weight->quantized + offset;
    uint16_t *scale = weight->scales + first;
    if (quantizer->count || quantizer->absmax || quantizer->multiplier != 1.0f) {
        groups_of(w, out, scale, count, scratch, n, dtype, given, quantizer);
        return;
    }
    // In small groups the loop overhead matters, so that common sizes have functions of their own.
    const float eps = quantizer->eps;
    if (n == 32 && dtype == BF16) bf16_by_32(w, out, scale, count, scratch, n, dtype, given, eps);
    else if (n == 64 && dtype == BF16) bf16_by_64(w, out, scale, count, scratch, n, dtype, given, eps);
    else if (n == 128 && dtype == BF16) bf16_by_128(w, out, scale, count, scratch, n, dtype, given, eps);
    else if (n == 32 && dtype == FP32) fp32_by_32(w, out, scale, count, scratch, n, dtype, given, eps);
    else by_any(w, out, scale, count, scratch, n, dtype, given, eps);
}

// Quantizes weights of one dtype, all in one parallel region: each thread takes an equal share of all elements.
//
//   given     whether the scales are read; else they are written
//   scratch   fp32 [threads, room]; `room` is at least 2 more than the longest group
void bitcpm_fake_quantize_all(const Weight *weights, int64_t count, float *scratch, int64_t room, int dtype, int given,
                              const Quantizer *quantizer, int threads) {
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++) elements += weights[i].groups * weights[i].n;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t begin = elements * t / threads, end = elements * (t + 1) / threads;
        for (int64_t i = 0; i < count && end > 0; i++) {
            const Weight *weight = weights + i;
            const int64_t first = group_from(weight, begin), last = group_from(weight, end);
            some_groups(weight, first, last, scratch + t * room, dtype, given, quantizer);
            begin -= weight->groups * weight->n;
            end -= weight->groups * weight->n;
        }
    }
}

// Quantizes one weight, for callers in which writing the table would take longer than quantizing a small weight.
void bitcpm_fake_quantize(const void *latent, void *quantized, uint16_t *scales, int64_t groups, int64_t n,
                          float *scratch, int dtype, int given, const Quantizer *quantizer, int threads) {
    const Weight weight = {latent, quantized, scales, groups, n};
    bitcpm_fake_quantize_all(&weight, 1, scratch, n + 2, dtype, given, quantizer, threads);
}
