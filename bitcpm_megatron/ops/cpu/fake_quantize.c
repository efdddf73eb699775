// SPDX-License-Identifier: Apache-2.0
//
// bitcpm::fake_quantize on a CPU: each group of a latent weight is read once from memory and written once, where the
// weight stands or elsewhere.
//
// Bit for bit the arithmetic of bitcpm_megatron/quantization/quantizer.py. The scale: |w| in fp32, summed as one binary
// tree over neighbours, divided by n, at least eps, rounded to bf16. The weight: under a scale s, w becomes +-s where
// |w| > s / 2, else +0.0. Magnitudes of floating-point numbers are ordered as their bits are as integers, so that
// threshold and selection need no conversion of the weight at all.
//
// Compile with -ffp-contract=off and without -ffast-math.

#include <math.h>
#include <stdint.h>

#include "bits.h"

enum { BF16 = 0, FP16 = 1, FP32 = 2 };
enum { PREFETCHED = 256 };  // elements of a group from which on it is worth its while

// fp32 of an fp16 magnitude (no sign bit); exact, and free of denormal fp32 values on the way.
static inline float from_fp16(uint32_t magnitude) {
    const uint32_t shifted = magnitude << 13;
    const float normal = as_float(shifted + (112u << 23));
    const float denormal = as_float(shifted + (113u << 23)) - 0x1p-14f;
    const float special = as_float(shifted | 0x7f800000u);
    return magnitude < 0x400 ? denormal : magnitude < 0x7c00 ? normal : special;
}

// fp16 bits of an fp32 magnitude, to nearest even, or down (towards zero) for a threshold.
static uint16_t to_fp16(float value, int down) {
    const uint32_t bits = as_bits(value);
    const int exponent = (int)(bits >> 23) - 127;
    if (isnan(value)) return 0x7e00;
    if (exponent > 15) return down && !isinf(value) ? 0x7bff : 0x7c00;
    const int dropped = exponent < -14 ? 13 - 14 - exponent : 13;  // below -14 the result is denormal
    if (dropped > 24) return 0;
    const uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
    uint32_t kept = mantissa >> dropped;
    const uint32_t rest = mantissa & ((1u << dropped) - 1), half = 1u << (dropped - 1);
    if (!down && (rest > half || (rest == half && (kept & 1)))) kept += 1;
    // The leading one adds 1 to the exponent field, and a carry of the rounding does so once more.
    return (uint16_t)(exponent < -14 ? kept : kept + ((uint32_t)(exponent + 14) << 10));
}

#define MAGNITUDE_BF16(bits) as_float((uint32_t)((bits) & 0x7fff) << 16)
#define MAGNITUDE_FP16(bits) from_fp16((bits) & 0x7fffu)
#define MAGNITUDE_FP32(bits) as_float((bits) & 0x7fffffffu)

// One level of the tree: sums of neighbours, and the last one alone where there is no pair for it.
static inline void add_neighbours(const float *restrict x, float *restrict sums, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) sums[i] = x[2 * i] + x[2 * i + 1];
    if (n % 2) sums[n / 2] = x[n - 1];
}

static inline float tree(float *x, float *y, int64_t n) {
    while (n > 1) {
        add_neighbours(x, y, n);
        n = (n + 1) / 2;
        float *sums = y;
        y = x, x = sums;
    }
    return x[0];
}

// The sum of the magnitudes of a group; the first level of the tree straight from the weight.
#define DEFINE_SUM(name, word, magnitude)                                                             \
    static inline float name(const word *restrict w, float *restrict scratch, int64_t n) {            \
        for (int64_t i = 0; i < n / 2; i++) scratch[i] = magnitude(w[2 * i]) + magnitude(w[2 * i + 1]); \
        if (n % 2) scratch[n / 2] = magnitude(w[n - 1]);                                              \
        return tree(scratch, scratch + (n + 1) / 2, (n + 1) / 2);                                     \
    }

DEFINE_SUM(sum_bf16, uint16_t, MAGNITUDE_BF16)
DEFINE_SUM(sum_fp16, uint16_t, MAGNITUDE_FP16)
DEFINE_SUM(sum_fp32, uint32_t, MAGNITUDE_FP32)

// A weight beyond the threshold keeps its sign and takes the magnitude `level`; NaN stays NaN. `out` is `w` itself or
// lies elsewhere: no iteration needs another one, which the compiler has to be told.
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

// Scales that training never makes: zero, negative, denormal, infinite or NaN. By the reference's division.
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

static inline __attribute__((always_inline)) void one_group(const void *w, void *out, uint16_t *scale, float *scratch,
                                                            int64_t n, int dtype, int given, float eps) {
    if (!given) {
        const float sum = dtype == BF16   ? sum_bf16(w, scratch, n)
                          : dtype == FP16 ? sum_fp16(w, scratch, n)
                                          : sum_fp32(w, scratch, n);
        const float mean = sum / (float)n;
        *scale = to_bf16(mean < eps ? eps : mean);  // NaN stays NaN
    }
    const float s = as_float((uint32_t)*scale << 16);
    if (!(s >= 0x1p-124f && s < INFINITY)) by_division(w, out, n, dtype, s);
    else if (dtype == BF16) select_bf16(w, out, n, to_bf16(s / 2), *scale);
    else if (dtype == FP16) select_fp16(w, out, n, to_fp16(s / 2, 1), to_fp16(s, 0));
    else select_fp32(w, out, n, as_bits(s / 2), as_bits(s));
}

// A weight of one call, in five words of 64 bits: contiguous [groups, n] of the call's dtype, one bf16 scale per group.
typedef struct {
    const void *latent;
    void *quantized;  // `latent` itself, or not overlapping with it
    uint16_t *scales;
    int64_t groups;
    int64_t n;
} Weight;

// The first group of a weight that begins at or after an element, counted from the weight's own first one.
static inline int64_t group_from(const Weight *weight, int64_t element) {
    if (element <= 0) return 0;
    const int64_t group = (element + weight->n - 1) / weight->n;
    return group < weight->groups ? group : weight->groups;
}

// Neighbouring groups of n elements. Where n and dtype are constants, the compiler unrolls what is done per group.
static inline __attribute__((always_inline)) void groups_of(const char *w, char *out, uint16_t *scale, int64_t count,
                                                            float *scratch, int64_t n, int dtype, int given, float eps) {
    const int64_t bytes = n * (dtype == FP32 ? 4 : 2);
    for (int64_t g = 0; g < count; g++, w += bytes, out += bytes, scale++) {
        // The next group comes while this one is being computed.
        if (n >= PREFETCHED)
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(w + bytes + i);
        one_group(w, out, scale, scratch, n, dtype, given, eps);
    }
}

static void some_groups(const Weight *weight, int64_t first, int64_t last, float *scratch, int dtype, int given,
                        float eps) {
    const int64_t n = weight->n, count = last - first, offset = first * n * (dtype == FP32 ? 4 : 2);
    const char *w = (const char *)weight->latent + offset;
    char *out = (char *)weight->quantized + offset;
    uint16_t *scale = weight->scales + first;
    // Small groups pay for their loops.
    if (n == 32 && dtype == BF16) groups_of(w, out, scale, count, scratch, 32, BF16, given, eps);
    else if (n == 64 && dtype == BF16) groups_of(w, out, scale, count, scratch, 64, BF16, given, eps);
    else if (n == 128 && dtype == BF16) groups_of(w, out, scale, count, scratch, 128, BF16, given, eps);
    else groups_of(w, out, scale, count, scratch, n, dtype, given, eps);
}

// Quantizes weights of one dtype, all in one parallel region: each thread takes an equal share of all elements.
//
//   given     whether the scales are read; else they are written
//   scratch   fp32, `room` elements for each of `threads`: 2 more than the longest group
void bitcpm_fake_quantize_all(const Weight *weights, int64_t count, float *scratch, int64_t room, int dtype, int given,
                              float eps, int threads) {
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++) elements += weights[i].groups * weights[i].n;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t begin = elements * t / threads, end = elements * (t + 1) / threads;
        for (int64_t i = 0; i < count && end > 0; i++) {
            const Weight *weight = weights + i;
            const int64_t first = group_from(weight, begin), last = group_from(weight, end);
            some_groups(weight, first, last, scratch + t * room, dtype, given, eps);
            begin -= weight->groups * weight->n;
            end -= weight->groups * weight->n;
        }
    }
}

// One weight, for a caller that would take longer to write a table of it than a small one takes to quantize.
void bitcpm_fake_quantize(const void *latent, void *quantized, uint16_t *scales, int64_t groups, int64_t n,
                          float *scratch, int dtype, int given, float eps, int threads) {
    const Weight weight = {latent, quantized, scales, groups, n};
    bitcpm_fake_quantize_all(&weight, 1, scratch, n + 2, dtype, given, eps, threads);
}
