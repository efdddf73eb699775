// SPDX-License-Identifier: Apache-2.0
// Computation of codes and values from magnitudes and spread scales; packing, counting and unpacking of codes.
#pragma once

#include "ternary_core.h"

namespace ternary {

// magnitude_ <- |input| of `padded` elements, with zeros beyond `count`, which add nothing and quantize to code 0.
template <typename T>
__aicore__ inline void Core<T>::Magnitudes(const LocalTensor<T>& input, uint32_t count, uint32_t padded)
{
    const uint32_t loaded = AlignUp(count, kBlock / sizeof(T));
    if (loaded < padded) {
        const LocalTensor<uint16_t> tail = input[loaded].template ReinterpretCast<uint16_t>();
        AscendC::Duplicate(tail, static_cast<uint16_t>(0), (padded - loaded) * (sizeof(T) / sizeof(uint16_t)));
        Barrier();
    }
    if constexpr (sizeof(T) == sizeof(float)) {
        AscendC::Abs(magnitude_, input, padded);
    } else {
        AscendC::Cast(magnitude_, input, RoundMode::CAST_NONE, padded);
        Barrier();
        AscendC::Abs(magnitude_, magnitude_, padded);
    }
    Barrier();
}

// output, code_ <- values and codes of `segments` segments of `length` elements, `padded` elements in all, from input
// and magnitude_. The blocks of the segments are spread; `across` is that of WithBlocks.
template <typename T>
__aicore__ inline void Core<T>::Quantize(const Weight<T>& weight, const LocalTensor<T>& input,
                                         const LocalTensor<T>& output, uint32_t segments, uint32_t length,
                                         uint32_t padded, bool across)
{
    constexpr bool wide = sizeof(T) == sizeof(float);
    constexpr uint32_t words = sizeof(T) / sizeof(uint16_t);
    constexpr uint32_t lanes = kVector / sizeof(uint16_t);
    using Bits = typename SelectAs<sizeof(T)>::Type;
    const uint32_t repeats = padded * words / lanes;
    const LocalTensor<uint16_t> outputWords = output.template ReinterpretCast<uint16_t>();
    const LocalTensor<Bits> outputBits = output.template ReinterpretCast<Bits>();

    if (weight.Has(kGivenScales)) {
        CompareWith(number_, magnitude_, 0.0f, AscendC::CMPMODE::GE, padded);
        Barrier();
    }
    WithBlocks<Subtract>(magnitude_, magnitude_, thresholdBlocks_, segments, length, across);
    AscendC::And(outputWords, input.template ReinterpretCast<uint16_t>(), signPattern_, lanes, repeats,
                 {1, 1, 0, 8, 8, 0});
    Barrier();
    CompareWith(mask_, magnitude_, 0.0f, AscendC::CMPMODE::GT, padded);
    if (weight.NeedsCodes()) {
        // The sign is combined with 1.0, which becomes the code. For fp32 the only room for it is that of the
        // magnitudes.
        LocalTensor<uint16_t> codeWords = code_.template ReinterpretCast<uint16_t>();
        if constexpr (wide) {
            codeWords = magnitude_.template ReinterpretCast<uint16_t>();
            Barrier();
        }
        AscendC::Or(codeWords, outputWords, onePattern_, lanes, repeats, {1, 1, 0, 8, 8, 0});
    }
    Barrier();
    if (weight.NeedsCodes()) {
        if constexpr (wide) {
            AscendC::Select(magnitude_, mask_, magnitude_, 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
        } else {
            AscendC::Select(code_, mask_, code_, static_cast<half>(0.0f),
                            AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
        }
    }
    WithBlocks<Unite>(outputWords, outputWords, valueBlocks_, segments, length * words, across);
    Barrier();
    if constexpr (wide) {
        if (weight.NeedsCodes()) {
            AscendC::Cast(code_, magnitude_, RoundMode::CAST_RINT, padded);
        }
    }
    AscendC::Select(outputBits, mask_, outputBits, static_cast<Bits>(0.0f),
                    AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
    Barrier();
    WithBlocks<Unite>(outputWords, outputWords, poisonBlocks_, segments, length * words, across);
    if constexpr (Same<T, half>::kValue) {
        // A scale below 2**-25 is 0 in fp16: -0.0 becomes +0.0.
        Barrier();
        AscendC::Adds(output, output, static_cast<half>(0.0f), padded);
    }
    if (weight.Has(kGivenScales)) {
        // With an own scale, a NaN among the weights makes the scale NaN. A given scale does not show it.
        Barrier();
        AscendC::Select(outputBits, number_, outputBits, NotANumber<sizeof(T)>(),
                        AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
    }
}

// Packs code_ and stores it, by Horner's rule over the four quarters of every 128 codes.
template <typename T>
__aicore__ inline void Core<T>::Pack(const Weight<T>& weight, uint64_t offset, uint32_t padded)
{
    const uint32_t blocks = padded / kPackedBlock;
    const uint32_t bytes = blocks * kPackedBlockBytes;
    AscendC::Muls(packing_, code_[96], static_cast<half>(4.0f), kPackedBlockBytes, blocks, {1, 1, 2, 8});
    Barrier();
    for (uint32_t quarter = 2; quarter > 0; --quarter) {
        AscendC::Add(packing_, packing_, code_[quarter * 32], kPackedBlockBytes, blocks, {1, 1, 1, 2, 2, 8});
        Barrier();
        AscendC::Muls(packing_, packing_, static_cast<half>(4.0f), bytes);
        Barrier();
    }
    AscendC::Add(packing_, packing_, code_, kPackedBlockBytes, blocks, {1, 1, 1, 2, 2, 8});
    Barrier();
    // The sum of (code + 1) 4^j is the sum of code 4^j, and 1 + 4 + 16 + 64.
    AscendC::Adds(packing_, packing_, static_cast<half>(85.0f), bytes);
    Barrier();
    LocalTensor<uint8_t> packed = packedQueue_.template AllocTensor<uint8_t>();
    AscendC::Cast(packed, packing_, RoundMode::CAST_RINT, bytes);
    packedQueue_.EnQue(packed);
    LocalTensor<uint8_t> done = packedQueue_.template DeQue<uint8_t>();
    AscendC::DataCopyPad(weight.packed[offset], done, {1, bytes, 0, 0, 0});
    packedQueue_.FreeTensor(done);
}

// other_ <- the codes of the packed bytes that LoadPrevious has queued.
template <typename T>
__aicore__ inline void Core<T>::Unpack(uint32_t padded)
{
    const uint32_t blocks = padded / kPackedBlock;
    const uint32_t words = padded / 8;
    constexpr uint32_t lanes = kVector / sizeof(uint16_t);
    LocalTensor<uint8_t> packed = previousQueue_.template DeQue<uint8_t>();
    const LocalTensor<uint16_t> pairs = packed.template ReinterpretCast<uint16_t>();
    const uint32_t stride = piece_ / 8;
    for (uint32_t quarter = 0; quarter < 4; ++quarter) {
        AscendC::ShiftRight(digits_[quarter * stride], pairs, static_cast<uint16_t>(2 * quarter), words);
    }
    previousQueue_.FreeTensor(packed);
    Barrier();
    for (uint32_t quarter = 0; quarter < 4; ++quarter) {
        const LocalTensor<uint16_t> digit = digits_[quarter * stride];
        const uint32_t whole = words / lanes;
        if (whole != 0) {
            AscendC::And(digit, digit, digitPattern_, lanes, whole, {1, 1, 0, 8, 8, 0});
        }
        if (words % lanes != 0) {
            const LocalTensor<uint16_t> rest = digit[whole * lanes];
            AscendC::And(rest, rest, digitPattern_, words % lanes, 1, {1, 1, 0, 8, 8, 0});
        }
    }
    Barrier();
    for (uint32_t quarter = 0; quarter < 4; ++quarter) {
        AscendC::Cast(other_[quarter * 32], digits_[quarter * stride].template ReinterpretCast<uint8_t>(),
                      RoundMode::CAST_NONE, kPackedBlockBytes, blocks, {1, 1, 8, 1});
    }
    Barrier();
    AscendC::Adds(other_, other_, static_cast<half>(-1.0f), padded);
    Barrier();
}

// statistics_ += the number of ones in other_, whose other elements are 0. `kind` is 0 for non-zero codes, 1 for
// changed codes.
template <typename T>
__aicore__ inline void Core<T>::CountOnes(uint32_t kind, uint32_t padded)
{
    constexpr uint32_t lanes = kVector / sizeof(half);
    const uint32_t sums = padded / lanes;
    const LocalTensor<half> partial = count_[kStatisticsLanes].template ReinterpretCast<half>();
    const LocalTensor<int32_t> total = statistics_[kind * kStatisticsLanes];
    SumRepeats<half>(partial, other_, lanes, sums, 8);
    Barrier();
    AscendC::Cast(count_, partial, RoundMode::CAST_RINT, sums);
    Barrier();
    AscendC::Add(total, total, count_, sums);
}

template <typename T>
__aicore__ inline void Core<T>::Count(const Weight<T>& weight, uint32_t padded)
{
    AscendC::Abs(other_, code_, padded);
    Barrier();
    CountOnes(0, padded);
    if (weight.Has(kCompare)) {
        Unpack(padded);
        AscendC::Sub(other_, other_, code_, padded);
        Barrier();
        AscendC::Abs(other_, other_, padded);
        Barrier();
        AscendC::Mins(other_, other_, static_cast<half>(1.0f), padded);
        Barrier();
        CountOnes(1, padded);
    }
}

// output <- levels times the scales, whose blocks are spread.
template <typename T>
__aicore__ inline void Core<T>::Dequantize(const LocalTensor<half>& levels, const LocalTensor<T>& output,
                                           uint32_t segments, uint32_t length, uint32_t padded, bool across)
{
    AscendC::Cast(magnitude_, levels, RoundMode::CAST_NONE, padded);
    Barrier();
    WithBlocks<Multiply>(magnitude_, magnitude_, thresholdBlocks_, segments, length, across);
    Barrier();
    if constexpr (sizeof(T) == sizeof(float)) {
        AscendC::Adds(output, magnitude_, 0.0f, padded);
    } else {
        AscendC::Cast(output, magnitude_, RoundMode::CAST_RINT, padded);
    }
    if constexpr (Same<T, half>::kValue) {
        Barrier();
        AscendC::Adds(output, output, static_cast<half>(0.0f), padded);
    }
}

}  // namespace ternary
