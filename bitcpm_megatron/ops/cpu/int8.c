// SPDX-License-Identifier: Apache-2.0
//
// The passes around an int8 GEMM on a CPU: over its bf16 input, over its sums, and over a ternary weight.
//
// The arithmetic is that of bitcpm_megatron/quantization/activations.py bit for bit, all of it in fp32 and rounded
// once. Compile with -ffp-contract=off and without -ffast-math.

#include <math.h>
#include <stdint.h>

#include "bits.h"

static inline float from_bf16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

// Rounds to nearest even a number that is not NaN. Unlike to_bf16 it has no branch, so that it vectorizes.
static inline uint16_t round_bf16(float value) {
    const uint32_t bits = as_bits(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Returns the largest magnitude. Magnitudes are ordered like their bits as integers; NaN is larger than all numbers.
static inline float largest(const uint16_t *x, const float *factors, int64_t n) {
    uint32_t most = 0;
    if (factors) {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = as_bits(from_bf16(x[i]) * factors[i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        return as_float(most);
    }
    uint16_t widest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t bits = x[i] & 0x7fff;
        widest = bits > widest ? bits : widest;
    }
    return from_bf16(widest);
}

// Quantizes each of `rows` rows of n numbers to int8, under one scale.
//
//   x         bf16 [rows, n]
//   factors   fp32 [n], by which the columns of x are multiplied first; or null
//   fake      bf16 [rows, n], written: the values that the codes represent, codes * scale / 127; or null
//   codes     int8 [rows, n], written; or null
//   scales    fp32 [rows], written; or null
void bitcpm_quantize_rows(const uint16_t *x, const float *factors, uint16_t *fake, int8_t *codes, float *scales,
                          int64_t rows, int64_t n, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *from = x + row * n;
        const float most = largest(from, factors, n);
        const float s = most < eps ? eps : most;  // NaN stays NaN
        int8_t *code = codes ? codes + row * n : 0;
        uint16_t *value = fake ? fake + row * n : 0;
        if (scales) scales[row] = s;
        if (!isfinite(s)) {
            // The value is NaN, as in the reference, where it is the product 0 * infinity or 0 * NaN.
            for (int64_t i = 0; i < n; i++) {
                if (code) code[i] = 0;
                if (value) value[i] = 0x7fc0;
            }
            continue;
        }
#define ROUNDED(i) rintf((factors ? from_bf16(from[i]) * factors[i] : from_bf16(from[i])) / s * 127.0f)
        if (code && !value) {
            for (int64_t i = 0; i < n; i++) code[i] = (int8_t)ROUNDED(i);
        } else if (code) {
            for (int64_t i = 0; i < n; i++) {
                const float level = ROUNDED(i);
                code[i] = (int8_t)level;
                value[i] = round_bf16(level * s / 127.0f + 0.0f);
            }
        } else if (value) {
            for (int64_t i = 0; i < n; i++) value[i] = round_bf16(ROUNDED(i) * s / 127.0f + 0.0f);
        }
#undef ROUNDED
    }
}

// Converts sums of products of integers, [rows, n], to bf16: sum * column scale * (row scale / 127).
//
//   columns   bf16 [n], or null
//   scales    fp32 [rows]
void bitcpm_scale_sums(const int32_t *sums, const uint16_t *columns, const float *scales, uint16_t *out, int64_t rows,
                       int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int32_t *from = sums + row * n;
        uint16_t *to = out + row * n;
        const float s = scales[row] / 127.0f;
        if (!isfinite(s)) {
            for (int64_t i = 0; i < n; i++) to[i] = to_bf16((float)from[i] * (columns ? from_bf16(columns[i]) : 1) * s);
        } else if (columns) {
            for (int64_t i = 0; i < n; i++) to[i] = to_bf16((float)from[i] * from_bf16(columns[i]) * s);
        } else {
            for (int64_t i = 0; i < n; i++) to[i] = to_bf16((float)from[i] * s);
        }
    }
}

// Writes the codes of a quantized weight [rows, n], and the scale of each row, which is its largest magnitude.
void bitcpm_codes(const uint16_t *weight, int8_t *codes, uint16_t *scales, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *from = weight + row * n;
        int8_t *code = codes + row * n;
        uint16_t most = 0;
        for (int64_t i = 0; i < n; i++) {
            const uint16_t magnitude = from[i] & 0x7fff;
            most = magnitude > most ? magnitude : most;
            const int one = magnitude != 0 && magnitude <= 0x7f80;  // NaN has the code 0, and its row a scale of NaN
            code[i] = (int8_t)(from[i] >> 15 ? -one : one);
        }
        scales[row] = most;
    }
}
