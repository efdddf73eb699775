// SPDX-License-Identifier: Apache-2.0
// The interface to the vector unit: its sizes, and the few instructions whose names or operands need care.
#pragma once

#include "kernel_operator.h"

namespace ternary {

using AscendC::LocalTensor;
using AscendC::RoundMode;

constexpr uint32_t kBlock = 32;
constexpr uint32_t kVector = 256;
constexpr uint32_t kFloatLanes = kVector / sizeof(float);

__aicore__ inline uint32_t AlignUp(uint32_t value, uint32_t unit)
{
    return (value + unit - 1) / unit * unit;
}

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

// Separates two vector instructions, the second of which needs the result of the first.
__aicore__ inline void Barrier()
{
    AscendC::PipeBarrier<PIPE_V>();
}

// mask <- one bit per value: whether it compares with the scalar as `mode` says. Only this function uses the
// instruction's name. It is CompareScalar from CANN 8.5 to the newest version, which also calls it Compares; 8.5 does
// not.
template <typename T>
__aicore__ inline void CompareWith(const LocalTensor<uint8_t>& mask, const LocalTensor<T>& values, T scalar,
                                   AscendC::CMPMODE mode, uint32_t count)
{
    AscendC::CompareScalar(mask, values, scalar, mode, count);
}

// sums <- the sum of each repeat. Only this function uses the name of the reduction, which is ReduceRepeat from CANN
// 9.1 on.
template <typename T>
__aicore__ inline void SumRepeats(const LocalTensor<T>& sums, const LocalTensor<T>& values, uint32_t lanes,
                                  uint32_t repeats, uint32_t valueStride)
{
#ifdef TERNARY_REDUCE_REPEAT
    AscendC::ReduceRepeat<AscendC::ReduceType::SUM, T>(sums, values, lanes, repeats, 1, 1, valueStride);
#else
    AscendC::WholeReduceSum<T>(sums, values, lanes, repeats, 1, 1, valueStride);
#endif
}

// largest <- the largest value of each repeat, without its index. `largest` is aligned to 8 bytes.
__aicore__ inline void LargestRepeats(const LocalTensor<float>& largest, const LocalTensor<float>& values, uint32_t lanes,
                                      uint32_t repeats, uint32_t valueStride)
{
#ifdef TERNARY_REDUCE_REPEAT
    AscendC::ReduceRepeat<AscendC::ReduceType::MAX, float>(largest, values, lanes, repeats, 1, 1, valueStride,
                                                           AscendC::ReduceOrder::ORDER_ONLY_VALUE);
#else
    AscendC::WholeReduceMax<float>(largest, values, lanes, repeats, 1, 1, valueStride,
                                   AscendC::ReduceOrder::ORDER_ONLY_VALUE);
#endif
}

// Binary instructions as types, for the loops over segments below.
struct Subtract {
    template <typename T>
    static __aicore__ inline void Run(const LocalTensor<T>& result, const LocalTensor<T>& values,
                                      const LocalTensor<T>& other, uint32_t mask, uint32_t repeats,
                                      const AscendC::BinaryRepeatParams& strides)
    {
        AscendC::Sub(result, values, other, mask, repeats, strides);
    }
};

struct Unite {
    template <typename T>
    static __aicore__ inline void Run(const LocalTensor<T>& result, const LocalTensor<T>& values,
                                      const LocalTensor<T>& other, uint32_t mask, uint32_t repeats,
                                      const AscendC::BinaryRepeatParams& strides)
    {
        AscendC::Or(result, values, other, mask, repeats, strides);
    }
};

struct Multiply {
    template <typename T>
    static __aicore__ inline void Run(const LocalTensor<T>& result, const LocalTensor<T>& values,
                                      const LocalTensor<T>& other, uint32_t mask, uint32_t repeats,
                                      const AscendC::BinaryRepeatParams& strides)
    {
        AscendC::Mul(result, values, other, mask, repeats, strides);
    }
};

// result <- values (op) the segment's own 32-byte block, for `segments` consecutive segments of `length` elements.
// Short segments are processed `across`, with one instruction per column of 256 bytes and one repeat per segment; long
// ones are processed one by one.
template <typename Op, typename T>
__aicore__ inline void WithBlocks(const LocalTensor<T>& result, const LocalTensor<T>& values,
                                  const LocalTensor<T>& blocks, uint32_t segments, uint32_t length, bool across)
{
    constexpr uint32_t lanes = kVector / sizeof(T);
    constexpr uint32_t blockLanes = kBlock / sizeof(T);
    if (across) {
        const uint32_t stride = length / blockLanes;
        for (uint32_t column = 0; column < length; column += lanes) {
            const uint32_t mask = Smaller(lanes, length - column);
            Op::Run(result[column], values[column], blocks, mask, segments, {1, 1, 0, stride, stride, 1});
        }
        return;
    }
    const uint32_t whole = length / lanes;
    const uint32_t tail = length % lanes;
    for (uint32_t i = 0; i < segments; ++i) {
        const LocalTensor<T> segment = result[i * length];
        const LocalTensor<T> from = values[i * length];
        const LocalTensor<T> block = blocks[i * blockLanes];
        Op::Run(segment, from, block, lanes, whole, {1, 1, 0, 8, 8, 0});
        if (tail != 0) {
            const LocalTensor<T> rest = from[whole * lanes];
            Op::Run(segment[whole * lanes], rest, block, tail, 1, {1, 1, 0, 8, 8, 0});
        }
    }
}

template <typename A, typename B>
struct Same {
    static constexpr bool kValue = false;
};
template <typename A>
struct Same<A, A> {
    static constexpr bool kValue = true;
};

// The type in which Select takes an element. bf16 is taken as half, because a selection does not interpret the bits.
template <uint32_t kBytes>
struct SelectAs {
    using Type = half;
};
template <>
struct SelectAs<4> {
    using Type = float;
};

// A NaN of bf16, fp16 or fp32, in the type that Select takes.
template <uint32_t kBytes>
__aicore__ inline typename SelectAs<kBytes>::Type NotANumber()
{
    union {
        uint32_t bits;
        typename SelectAs<kBytes>::Type value;
    } number;
    number.bits = kBytes == 4 ? 0x7FC00000u : 0x7FC0u;
    return number.value;
}

}  // namespace ternary
