// SPDX-License-Identifier: Apache-2.0
// The scales of a tile's segments: computed from their sums or given, and spread to a block of 32 bytes each.
#pragma once

#include "ternary_core.h"

namespace ternary {

// scale_ <- the given scales of `segments` segments.
template <typename T>
__aicore__ inline void Core<T>::GivenScales(const Weight<T>& weight, uint64_t first, uint32_t segments)
{
    LocalTensor<bfloat16_t> given = scaleInQueue_.template AllocTensor<bfloat16_t>();
    LoadWords(given.template ReinterpretCast<uint16_t>(), weight.scales[first], segments);
    scaleInQueue_.EnQue(given);
    LocalTensor<bfloat16_t> ready = scaleInQueue_.template DeQue<bfloat16_t>();
    AscendC::Cast(scale_, ready, RoundMode::CAST_NONE, AlignUp(segments, 8));
    Barrier();
    scaleInQueue_.FreeTensor(ready);
}

// scale_ <- the scales from the sums in sum_, or from the largest magnitudes in threshold_. They are also written to
// global memory.
template <typename T>
__aicore__ inline void Core<T>::OwnScales(const Weight<T>& weight, uint64_t first, uint32_t segments)
{
    const uint32_t padded = AlignUp(segments, 8);
    if (weight.Has(kAbsmax)) {
        // The result of a maximum with NaN is not documented. A sum of magnitudes is NaN exactly if one of them is.
        CompareWith(mask_, sum_, 0.0f, AscendC::CMPMODE::GE, AlignUp(segments, kFloatLanes));
        Barrier();
        AscendC::Select(sum_, mask_, threshold_, sum_, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, segments);
    } else if (weight.reciprocal != 0.0f) {
        AscendC::Muls(sum_, sum_, weight.reciprocal, padded);
    } else {
        AscendC::Div(sum_, sum_, length_, padded);
    }
    Barrier();
    if (weight.multiplier != 1.0f) {
        AscendC::Muls(sum_, sum_, weight.multiplier, padded);
        Barrier();
    }
    // Maxs is not used, because its result with NaN is not documented, and a NaN must be kept.
    CompareWith(mask_, sum_, weight.epsilon, AscendC::CMPMODE::LT, AlignUp(segments, kFloatLanes));
    Barrier();
    AscendC::Select(scale_, mask_, epsilon_, sum_, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, padded);
    Barrier();
    LocalTensor<bfloat16_t> own = scaleOutQueue_.template AllocTensor<bfloat16_t>();
    AscendC::Cast(own, scale_, RoundMode::CAST_RINT, padded);
    Barrier();
    AscendC::Cast(scale_, own, RoundMode::CAST_NONE, padded);
    Barrier();
    scaleOutQueue_.EnQue(own);
    LocalTensor<bfloat16_t> done = scaleOutQueue_.template DeQue<bfloat16_t>();
    AscendC::DataCopyPad(weight.scales[first], done.template ReinterpretCast<uint16_t>(),
                         {1, static_cast<uint32_t>(segments * sizeof(uint16_t)), 0, 0, 0});
    scaleOutQueue_.FreeTensor(done);
}

// Spreads scale_ to 32-byte blocks, three per segment: s / 2, the bits of s as T, and NaN if s is not finite, else 0.
template <typename T>
__aicore__ inline void Core<T>::SpreadScales(uint32_t segments)
{
    const uint32_t padded = AlignUp(segments, 8);
    const uint32_t repeats = padded / 8;
    AscendC::Muls(threshold_, scale_, 0.5f, padded);
    AscendC::Sub(poison_, scale_, scale_, padded);
    Barrier();
    AscendC::Brcb(thresholdBlocks_, threshold_, repeats, {1, 8});
    if constexpr (sizeof(T) == sizeof(half)) {
        const LocalTensor<T> poison = value_[maxSegments_];
        AscendC::Cast(value_, scale_, RoundMode::CAST_RINT, padded);
        AscendC::Cast(poison, poison_, RoundMode::CAST_RINT, padded);
        Barrier();
        AscendC::Brcb(valueBlocks_, value_.template ReinterpretCast<uint16_t>(), repeats, {1, 8});
        AscendC::Brcb(poisonBlocks_, poison.template ReinterpretCast<uint16_t>(), repeats, {1, 8});
    } else {
        AscendC::Brcb(valueBlocks_.template ReinterpretCast<float>(), scale_, repeats, {1, 8});
        AscendC::Brcb(poisonBlocks_.template ReinterpretCast<float>(), poison_, repeats, {1, 8});
    }
    Barrier();
}

// Spreads scale_ to one block of s per segment, for Dequantize. Unpack, which runs before that, has the barriers.
template <typename T>
__aicore__ inline void Core<T>::SpreadFactors(uint32_t segments)
{
    AscendC::Brcb(thresholdBlocks_, scale_, AlignUp(segments, 8) / 8, {1, 8});
}

}  // namespace ternary
