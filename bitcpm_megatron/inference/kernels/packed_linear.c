// SPDX-License-Identifier: Apache-2.0
//
// Products of few tokens with ternary weights that stay packed, y = x W^T with sums in fp32; and unpacking of W's rows.
//
// W is [rows, columns]. A row of codes is stored in blocks of 128 codes, 32 bytes each, as in
// bitcpm_megatron/quantization/packing.py: bits 2 j and 2 j + 1 of byte i hold the code of element 32 j + i, plus 1.
// The last block is filled up with codes 0, and the activations there are zeros, too. A group is a whole row or a
// multiple of 32 elements, so that 32 consecutive elements, a field, have one scale.
//
// Products take two blocks at a time, as 16 words of 32 bits with 16 codes each, and nothing is moved between words:
// the activations are put into the order in which the codes come, once for all rows. The two bits of a code suffice to
// make a number of it: in two's complement they are 11, 00 and 01, and at the top of a word, above zeros, these are the
// bits of -2.0, 0.0 and 2.0. Vectors have 16 numbers; the compiler maps them to the registers that the processor has.
// Words are little-endian.

#include <stdint.h>
#include <string.h>

#include "../../ops/cpu/bits.h"

enum { FIELD = 32, FIELDS = 4, BLOCK = FIELDS * FIELD, BYTES = 32, LANES = 16, PAIR = 2 * BLOCK };
// The size of a tile of products; CHUNK counts pairs of blocks.
enum { ROWS = 4, TOKENS = 4, MOST_TOKENS = 32, CHUNK = 4 };

typedef float Lanes __attribute__((vector_size(64)));
typedef float HalfLanes __attribute__((vector_size(32)));
typedef float QuarterLanes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(64)));

// A packed weight. Codes are [rows, blocks * 32]; scales are bf16, [rows, groups].
typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    const int32_t *group_of;  // the group of every field of a row, including those that fill up the last pair of blocks
    int64_t blocks, pairs, groups;
} Weight;

static inline float from_bf16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

static inline Lanes load(const float *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

// Loads two blocks of codes, in two's complement. After an odd last block come bytes of 0, whose activations are 0.
static inline Words load_codes(const Weight *w, int64_t row, int64_t pair) {
    const uint8_t *from = w->codes + (row * w->blocks + 2 * pair) * BYTES;
    Words words = {0};
    if (2 * pair + 1 < w->blocks) memcpy(&words, from, sizeof words);
    else memcpy(&words, from, BYTES);
    const Words low = words & 0x55555555u, high = (words >> 1) & 0x55555555u;
    return (low ^ 0x55555555u) | ((low | high) ^ 0x55555555u) << 1;
}

// Returns the k-th of the 16 codes of every word, times 2.
static inline Lanes doubled(Words codes, int k) {
    const Words top = (codes << (30 - 2 * k)) & 0xc0000000u;
    Lanes numbers;
    memcpy(&numbers, &top, sizeof numbers);
    return numbers;
}

// Returns half the scales of the same field in two blocks.
static inline Lanes half_scales(const Weight *w, int64_t row, int64_t pair, int field) {
    const uint16_t *scales = w->scales + row * w->groups;
    const int32_t *group_of = w->group_of + pair * 2 * FIELDS + field;
    const float a = 0.5f * from_bf16(scales[group_of[0]]), b = 0.5f * from_bf16(scales[group_of[FIELDS]]);
    return (Lanes){a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
}

static inline float sum_of(Lanes lanes) {
    HalfLanes half[2];
    memcpy(half, &lanes, sizeof lanes);
    half[0] += half[1];
    QuarterLanes quarter[2];
    memcpy(quarter, half, sizeof half[0]);
    const QuarterLanes sums = quarter[0] + quarter[1];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Returns the product of one row with one token. Signed activations are summed first, and then multiplied by the scale.
static float one_product(const Weight *w, int64_t row, const float *x) {
    Lanes total = {0}, sums[FIELDS] = {{0}};
    for (int64_t pair = 0; pair < w->pairs; pair++, x += PAIR) {
        const Words codes = load_codes(w, row, pair);
        for (int k = 0; k < LANES; k++) sums[k % FIELDS] += doubled(codes, k) * load(x + k * LANES);
        if (w->groups == 1) continue;
        for (int field = 0; field < FIELDS; field++) {
            total += sums[field] * half_scales(w, row, pair, field);
            sums[field] = (Lanes){0};
        }
    }
    if (w->groups == 1) total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * half_scales(w, row, 0, 0);
    return sum_of(total);
}

// Computes the products of ROWS rows with all tokens, in pieces of the rows that stay in the cache for all tokens.
static void some_products(const Weight *w, int64_t first, int64_t rows, const float *x, int tokens,
                          Lanes sums[MOST_TOKENS][ROWS]) {
    float unpacked[ROWS][CHUNK * PAIR] __attribute__((aligned(64)));
    memset(sums, 0, sizeof(Lanes[MOST_TOKENS][ROWS]));
    for (int64_t start = 0; start < w->pairs; start += CHUNK) {
        const int64_t count = w->pairs - start < CHUNK ? w->pairs - start : CHUNK;
        for (int r = 0; r < ROWS; r++) {
            // Places after the last row repeat that row; their sums are not used.
            const int64_t row = first + r < rows ? first + r : rows - 1;
            for (int64_t pair = 0; pair < count; pair++) {
                const Words codes = load_codes(w, row, start + pair);
                Lanes scales[FIELDS];
                for (int field = 0; field < FIELDS; field++) scales[field] = half_scales(w, row, start + pair, field);
                for (int k = 0; k < LANES; k++) {
                    const Lanes weights = doubled(codes, k) * scales[k % FIELDS];
                    memcpy(unpacked[r] + pair * PAIR + k * LANES, &weights, sizeof weights);
                }
            }
        }
        for (int token = 0; token < tokens; token += TOKENS) {
            const float *values = x + (token * w->pairs + start) * PAIR;
            Lanes products[TOKENS][ROWS];
            memcpy(products, sums[token], sizeof products);
            for (int64_t i = 0; i < count * PAIR; i += LANES) {
                Lanes weights[ROWS];
                for (int r = 0; r < ROWS; r++) weights[r] = load(unpacked[r] + i);
                for (int t = 0; t < TOKENS; t++) {
                    const Lanes of_token = load(values + t * w->pairs * PAIR + i);
                    for (int r = 0; r < ROWS; r++) products[t][r] += of_token * weights[r];
                }
            }
            memcpy(sums[token], products, sizeof products);
        }
    }
}

// Writes the activations [tokens, columns] as fp32 in the order of the codes: the k-th code of a word is field k % 4 of
// byte k / 4 of the word. Rows are filled up with zeros, and so are the tokens, up to `filled`.
static void arrange(const void *x, int is_bf16, int64_t columns, int64_t pairs, int tokens, int filled, float *to) {
    for (int token = 0; token < filled; token++)
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int k = 0; k < LANES; k++)
                for (int word = 0; word < LANES; word++) {
                    const int inside = word / 8 * BLOCK + k % FIELDS * FIELD + word % 8 * 4 + k / FIELDS;
                    const int64_t column = pair * PAIR + inside, place = token * columns + column;
                    if (token >= tokens || column >= columns) *to++ = 0.0f;
                    else *to++ = is_bf16 ? from_bf16(((const uint16_t *)x)[place]) : ((const float *)x)[place];
                }
}

static inline void store(void *y, int is_bf16, int64_t place, float value) {
    if (is_bf16) ((uint16_t *)y)[place] = to_bf16(value);
    else ((float *)y)[place] = value;
}

// Computes y = x W^T for at most MOST_TOKENS tokens.
//
//   x         the activations [tokens, columns], bf16 or fp32
//   codes     the packed codes [rows, blocks * 32]
//   scales    the scales [rows, groups], bf16
//   y         the output [tokens, rows], in the dtype of x
//   arranged  scratch memory, fp32, [tokens rounded up to a multiple of 4, pairs of blocks * 256]
//   group_of  scratch memory, int32, [pairs of blocks * 8]
void bitcpm_packed_product(const void *x, const uint8_t *codes, const uint16_t *scales, void *y, float *arranged,
                           int32_t *group_of, int64_t rows, int64_t columns, int64_t groups, int tokens, int is_bf16,
                           int threads) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, pairs = (blocks + 1) / 2;
    const int filled = tokens <= TOKENS ? tokens : (tokens + TOKENS - 1) / TOKENS * TOKENS;
    for (int64_t field = 0; field < pairs * 2 * FIELDS; field++) {
        const int64_t column = field * FIELD < columns ? field * FIELD : columns - 1;
        group_of[field] = (int32_t)(column / (columns / groups));
    }
    const Weight w = {codes, scales, group_of, blocks, pairs, groups};
    arrange(x, is_bf16, columns, pairs, tokens, filled, arranged);
    if (tokens <= TOKENS) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t row = 0; row < rows; row++)
            for (int token = 0; token < tokens; token++)
                store(y, is_bf16, token * rows + row, one_product(&w, row, arranged + token * pairs * PAIR));
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t tile = 0; tile < (rows + ROWS - 1) / ROWS; tile++) {
        Lanes sums[MOST_TOKENS][ROWS];
        const int64_t first = tile * ROWS;
        some_products(&w, first, rows, arranged, filled, sums);
        for (int token = 0; token < tokens; token++)
            for (int r = 0; r < ROWS && first + r < rows; r++)
                store(y, is_bf16, token * rows + first + r, sum_of(sums[token][r]));
    }
}

// Unpacks the first `count` codes of a field to numbers: `plus` for 1, `minus` for -1, else +0.0.
#define DEFINE_UNPACK(name, word)                                                                          \
    static inline void name(const uint8_t *bytes, int field, int count, word minus, word plus, word *to) { \
        for (int i = 0; i < count; i++) {                                                                  \
            const int code = bytes[i] >> 2 * field & 3;                                                    \
            to[i] = code == 2 ? plus : code == 0 ? minus : (word)0;                                        \
        }                                                                                                  \
    }

DEFINE_UNPACK(unpack_bf16, uint16_t)
DEFINE_UNPACK(unpack_fp32, uint32_t)

// Unpacks the weight [rows, columns] to bf16 or fp32. Both are exact: a code times a bf16 scale is a bf16 number.
void bitcpm_unpack_rows(const uint8_t *codes, const uint16_t *scales, void *weight, int64_t rows, int64_t columns,
                        int64_t groups, int is_bf16, int threads) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, group = columns / groups;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *scale = scales + row * groups;
        for (int64_t first = 0, left = group; first < columns; first += FIELD, left -= FIELD) {
            if (left <= 0) left = group, scale++;
            const uint8_t *bytes = codes + (row * blocks + first / BLOCK) * BYTES;
            const int field = (int)(first % BLOCK / FIELD);
            const int count = columns - first < FIELD ? (int)(columns - first) : FIELD;
            // A scale of 0 gives +0.0 for all codes.
            const uint16_t plus = *scale & 0x7fff ? *scale : 0, minus = plus ? plus ^ 0x8000 : 0;
            if (!is_bf16) {
                uint32_t *to = (uint32_t *)weight + row * columns + first;
                if (count == FIELD) unpack_fp32(bytes, field, FIELD, (uint32_t)minus << 16, (uint32_t)plus << 16, to);
                else unpack_fp32(bytes, field, count, (uint32_t)minus << 16, (uint32_t)plus << 16, to);
            } else {
                uint16_t *to = (uint16_t *)weight + row * columns + first;
                if (count == FIELD) unpack_bf16(bytes, field, FIELD, minus, plus, to);
                else unpack_bf16(bytes, field, count, minus, plus, to);
            }
        }
    }
}
