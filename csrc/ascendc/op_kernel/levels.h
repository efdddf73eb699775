// SPDX-License-Identifier: Apache-2.0
// All spaces except ternary, with the levels and thresholds of the table: one comparison per threshold.
//
// The levels are chosen upward: a weight that is not beyond the next threshold keeps its present level, any other takes
// the next one. w - t s is compared with 0, which is exact. With infinities the difference may be NaN, which compares
// false. The comparisons are chosen so that w is then on its threshold: w < t s if a tie goes up, and else the negation
// of w > t s.
#pragma once

#include "codes.h"

namespace ternary {

// code_ <- the levels of the weights `exact`, under the scales of scale_. There is no barrier after the last selection.
template <typename T>
__aicore__ inline void Core<T>::FindLevels(const LocalTensor<float>& exact, uint32_t segments, uint32_t length,
                                           uint32_t padded, bool across)
{
    const uint32_t scales = AlignUp(segments, 8);
    const LocalTensor<uint16_t> maskWords = mask_.template ReinterpretCast<uint16_t>();
    AscendC::Duplicate(code_, static_cast<half>(numbers_.GetValue(kLevel)), padded);
    for (uint32_t k = 0; k < thresholds_; ++k) {
        AscendC::Muls(threshold_, scale_, numbers_.GetValue(kThreshold + k), scales);
        Barrier();
        AscendC::Brcb(thresholdBlocks_, threshold_, scales / 8, {1, 8});
        Barrier();
        WithBlocks<Subtract>(magnitude_, exact, thresholdBlocks_, segments, length, across);
        Barrier();
        if ((upperTies_ & (1u << k)) != 0) {
            CompareWith(mask_, magnitude_, 0.0f, AscendC::CMPMODE::LT, padded);
        } else {
            CompareWith(mask_, magnitude_, 0.0f, AscendC::CMPMODE::GT, padded);
            Barrier();
            AscendC::Not(maskWords, maskWords, padded / 16);
        }
        Barrier();
        AscendC::Select(code_, mask_, code_, static_cast<half>(numbers_.GetValue(kLevel + 1 + k)),
                        AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
    }
}

// output <- the levels of the weights times their scales, from input, magnitude_ and scale_. `segments`, `length`,
// `padded` and `across` are those of Quantize.
template <typename T>
__aicore__ inline void Core<T>::QuantizeLevels(const Weight<T>& weight, const LocalTensor<T>& input,
                                               const LocalTensor<T>& output, uint32_t segments, uint32_t length,
                                               uint32_t padded, bool across)
{
    using Bits = typename SelectAs<sizeof(T)>::Type;
    const LocalTensor<Bits> outputBits = output.template ReinterpretCast<Bits>();
    const uint32_t scales = AlignUp(segments, 8);
    LocalTensor<float> exact = exact_;
    if constexpr (sizeof(T) == sizeof(float)) {
        exact = input;
    } else {
        AscendC::Cast(exact, input, RoundMode::CAST_NONE, padded);
    }
    if (weight.Has(kGivenScales)) {
        CompareWith(number_, magnitude_, 0.0f, AscendC::CMPMODE::GE, padded);
    }
    FindLevels(exact, segments, length, padded, across);
    // s + (s - s) is NaN if s is not finite, and so is any level times it.
    AscendC::Sub(poison_, scale_, scale_, scales);
    Barrier();
    AscendC::Add(poison_, poison_, scale_, scales);
    Barrier();
    AscendC::Brcb(thresholdBlocks_, poison_, scales / 8, {1, 8});
    Dequantize(code_, output, segments, length, padded, across);
    Barrier();
    if (weight.Has(kGivenScales)) {
        AscendC::Select(outputBits, number_, outputBits, NotANumber<sizeof(T)>(),
                        AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
    }
}

}  // namespace ternary
