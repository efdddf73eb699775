// SPDX-License-Identifier: Apache-2.0
// The kernel for many segments per tile: groups and rows of up to 4096 elements, in multiples of 32.
#pragma once

#include "levels.h"
#include "scales.h"

namespace ternary {

template <typename T>
class TileKernel : public Core<T> {
public:
    __aicore__ inline TileKernel(GM_ADDR table, AscendC::TPipe* pipe) : Core<T>(table, pipe) {}

    __aicore__ inline void Process()
    {
        Weight<T> weight;
        for (uint32_t i = this->firstWeight_, next = this->begin_; next < this->end_; ++i) {
            this->ReadWeight(i, weight);
            const uint32_t end = Smaller(this->end_, weight.firstTile + weight.tiles);
            this->BeginWeight(weight);
            for (; next < end; ++next) {
                Tile(weight, next - weight.firstTile);
            }
            this->EndWeight(weight);
        }
    }

private:
    __aicore__ inline void Tile(const Weight<T>& weight, uint32_t tile)
    {
        const uint32_t line = tile / weight.tilesPerLine;
        const uint32_t whole = weight.tileSegments * weight.segment;
        const uint32_t start = tile % weight.tilesPerLine * whole;
        const uint32_t count = Smaller(whole, weight.lineLength - start);
        const uint32_t segments = count / weight.segment;
        const uint32_t padded = AlignUp(count, kPackedBlock);
        const uint32_t packedBytes = padded / kPackedBlock * kPackedBlockBytes;
        const uint64_t offset = static_cast<uint64_t>(line) * weight.lineLength + start;
        const uint64_t firstSegment = static_cast<uint64_t>(line) * (weight.lineLength / weight.segment) +
                                      start / weight.segment;
        const uint64_t packedOffset = static_cast<uint64_t>(line) * weight.linePackedBytes + start / 4;
        const bool across = weight.segment <= kAcrossLimit;

        if (weight.Has(kCompare) || weight.Has(kUnpack)) {
            this->LoadPrevious(weight, packedOffset, packedBytes);
        }
        if (weight.Has(kUnpack)) {
            this->GivenScales(weight, firstSegment, segments);
            this->SpreadFactors(segments);
            this->Unpack(padded);
            LocalTensor<T> output = this->outputQueue_.template AllocTensor<T>();
            this->Dequantize(this->other_, output, segments, weight.segment, padded, across);
            this->StoreOutput(weight, output, offset, count);
            return;
        }
        this->LoadInput(weight, offset, count);
        LocalTensor<T> input = this->inputQueue_.template DeQue<T>();
        this->Magnitudes(input, count, padded);
        if (weight.Has(kGivenScales)) {
            this->GivenScales(weight, firstSegment, segments);
        } else {
            Sum(segments, weight.segment, across);
            if (weight.Has(kAbsmax)) {
                Largest(segments, weight.segment, across);
            }
            this->OwnScales(weight, firstSegment, segments);
        }
        if (!weight.Has(kLevels)) {
            this->SpreadScales(segments);
        }
        LocalTensor<T> output = this->outputQueue_.template AllocTensor<T>();
        if (weight.Has(kLevels)) {
            this->QuantizeLevels(weight, input, output, segments, weight.segment, padded, across);
        } else {
            this->Quantize(weight, input, output, segments, weight.segment, padded, across);
        }
        this->inputQueue_.FreeTensor(input);
        this->StoreOutput(weight, output, offset, count);
        if (weight.Has(kPack)) {
            this->Pack(weight, packedOffset, padded);
        }
        if (weight.Has(kCount)) {
            this->Count(weight, padded);
        }
    }

    // sum_ <- the sum of each segment of magnitude_.
    __aicore__ inline void Sum(uint32_t segments, uint32_t length, bool across)
    {
        const uint32_t columns = AlignUp(length, kFloatLanes) / kFloatLanes;
        if (across) {
            SumAcross(segments, length, columns);
        } else {
            SumAlong(segments, length, columns);
        }
    }

    // Sums column by column over all segments at once, then the columns in pairs of neighbors.
    __aicore__ inline void SumAcross(uint32_t segments, uint32_t length, uint32_t columns)
    {
        const uint32_t stride = AlignUp(segments, kBlock / sizeof(float));
        const LocalTensor<float> first = columns == 1 ? this->sum_ : this->partial_;
        for (uint32_t i = 0; i < columns; ++i) {
            const uint32_t lanes = Smaller(kFloatLanes, length - i * kFloatLanes);
            SumRepeats<float>(first[i * stride], this->magnitude_[i * kFloatLanes], lanes, segments,
                              length / (kBlock / sizeof(float)));
        }
        Barrier();
        for (uint32_t step = 1; step < columns; step *= 2) {
            const bool last = 2 * step >= columns;
            for (uint32_t i = 0; i + step < columns; i += 2 * step) {
                const LocalTensor<float> left = first[i * stride];
                const LocalTensor<float> sum = last ? this->sum_ : left;
                AscendC::Add(sum, left, first[(i + step) * stride], segments);
            }
            Barrier();
        }
    }

    __aicore__ inline void SumAlong(uint32_t segments, uint32_t length, uint32_t columns)
    {
        const uint32_t stride = AlignUp(columns, kBlock / sizeof(float));
        const uint32_t whole = length / kFloatLanes;
        const uint32_t tail = length % kFloatLanes;
        for (uint32_t i = 0; i < segments; ++i) {
            const LocalTensor<float> segment = this->magnitude_[i * length];
            const LocalTensor<float> sums = this->partial_[i * stride];
            SumRepeats<float>(sums, segment, kFloatLanes, whole, 8);
            if (tail != 0) {
                SumRepeats<float>(sums[whole], segment[whole * kFloatLanes], tail, 1, 8);
            }
        }
        Barrier();
        SumRepeats<float>(this->sum_, this->partial_, columns, segments, stride / (kBlock / sizeof(float)));
        Barrier();
    }

    // threshold_ <- the largest magnitude of each segment of magnitude_, if none is NaN. It runs after Sum and uses the
    // same buffers. There is no barrier at the end, because OwnScales has one before it reads the result.
    __aicore__ inline void Largest(uint32_t segments, uint32_t length, bool across)
    {
        const uint32_t whole = length / kFloatLanes;
        if (across) {
            LargestAcross(segments, length);
            return;
        }
        const uint32_t stride = AlignUp(whole, kBlock / sizeof(float));
        const uint32_t tail = length % kFloatLanes;
        for (uint32_t i = 0; i < segments; ++i) {
            LargestRepeats(this->partial_[i * stride], this->magnitude_[i * length], kFloatLanes, whole, 8);
        }
        if (tail != 0) {
            // This covers all segments at once: the maximum of a single one would be stored at an address aligned to
            // only 4 bytes.
            LargestRepeats(this->scale_, this->magnitude_[whole * kFloatLanes], tail, segments,
                           length / (kBlock / sizeof(float)));
        }
        Barrier();
        LargestRepeats(this->threshold_, this->partial_, whole, segments, stride / (kBlock / sizeof(float)));
        if (tail != 0) {
            Barrier();
            AscendC::Max(this->threshold_, this->threshold_, this->scale_, segments);
        }
    }

    __aicore__ inline void LargestAcross(uint32_t segments, uint32_t length)
    {
        const uint32_t stride = AlignUp(segments, kBlock / sizeof(float));
        const uint32_t columns = AlignUp(length, kFloatLanes) / kFloatLanes;
        for (uint32_t i = 0; i < columns; ++i) {
            const LocalTensor<float> largest = i == 0 ? this->threshold_ : this->partial_[i * stride];
            LargestRepeats(largest, this->magnitude_[i * kFloatLanes], Smaller(kFloatLanes, length - i * kFloatLanes),
                           segments, length / (kBlock / sizeof(float)));
        }
        for (uint32_t i = 1; i < columns; ++i) {
            Barrier();
            AscendC::Max(this->threshold_, this->threshold_, this->partial_[i * stride], segments);
        }
    }
};

template <typename T>
__aicore__ inline void RunTiles(GM_ADDR table)
{
    AscendC::TPipe pipe;
    TileKernel<T> kernel(table, &pipe);
    kernel.Process();
}

}  // namespace ternary
