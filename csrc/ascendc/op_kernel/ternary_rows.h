// SPDX-License-Identifier: Apache-2.0
// The kernel for one segment at a time, in pieces: long rows and groups, and rows that are not a multiple of 32. A
// segment that fits stays in UB between summing and quantizing; any other is read twice.
#pragma once

#include "levels.h"
#include "scales.h"

namespace ternary {

template <typename T>
class RowKernel : public Core<T> {
public:
    __aicore__ inline RowKernel(GM_ADDR table, AscendC::TPipe* pipe) : Core<T>(table, pipe) {}

    __aicore__ inline void Process()
    {
        Weight<T> weight;
        for (uint32_t i = this->firstWeight_, next = this->begin_; next < this->end_; ++i) {
            this->ReadWeight(i, weight);
            const uint32_t end = Smaller(this->end_, weight.firstTile + weight.tiles);
            this->BeginWeight(weight);
            for (; next < end; ++next) {
                Row(weight, next - weight.firstTile);
            }
            this->EndWeight(weight);
        }
    }

private:
    __aicore__ inline void Row(const Weight<T>& weight, uint32_t row)
    {
        const uint64_t offset = static_cast<uint64_t>(row) * weight.segment;
        const uint64_t packedOffset = static_cast<uint64_t>(row) * weight.linePackedBytes;
        const bool resident = weight.Has(kResident);

        if (resident) {
            this->LoadInput(weight, offset, weight.segment);
            row_ = this->inputQueue_.template DeQue<T>();
        }
        if (weight.Has(kGivenScales)) {
            this->GivenScales(weight, row, 1);
        } else {
            Sum(weight, offset, resident);
            this->OwnScales(weight, row, 1);
        }
        if (weight.Has(kUnpack)) {
            this->SpreadFactors(1);
        } else if (!weight.Has(kLevels)) {
            this->SpreadScales(1);
        }
        for (uint32_t start = 0; start < weight.segment; start += this->piece_) {
            const uint32_t count = Smaller(this->piece_, weight.segment - start);
            Piece(weight, offset + start, packedOffset + start / 4, start, count);
        }
        if (resident) {
            this->inputQueue_.FreeTensor(row_);
        }
    }

    __aicore__ inline void Piece(const Weight<T>& weight, uint64_t offset, uint64_t packedOffset, uint32_t start,
                                 uint32_t count)
    {
        const uint32_t padded = AlignUp(count, kPackedBlock);
        if (weight.Has(kCompare) || weight.Has(kUnpack)) {
            this->LoadPrevious(weight, packedOffset, padded / kPackedBlock * kPackedBlockBytes);
        }
        if (weight.Has(kUnpack)) {
            this->Unpack(padded);
            LocalTensor<T> output = this->outputQueue_.template AllocTensor<T>();
            this->Dequantize(this->other_, output, 1, padded, padded, false);
            this->StoreOutput(weight, output, offset, count);
            return;
        }
        const bool resident = weight.Has(kResident);
        LocalTensor<T> input = Input(weight, offset, start, count, resident);
        this->Magnitudes(input, count, padded);
        LocalTensor<T> output = this->outputQueue_.template AllocTensor<T>();
        if (weight.Has(kLevels)) {
            this->QuantizeLevels(weight, input, output, 1, padded, padded, false);
        } else {
            this->Quantize(weight, input, output, 1, padded, padded, false);
        }
        if (!resident) {
            this->inputQueue_.FreeTensor(input);
        }
        this->StoreOutput(weight, output, offset, count);
        if (weight.Has(kPack)) {
            this->Pack(weight, packedOffset, padded);
        }
        if (weight.Has(kCount)) {
            this->Count(weight, padded);
        }
    }

    __aicore__ inline LocalTensor<T> Input(const Weight<T>& weight, uint64_t offset, uint32_t start, uint32_t count,
                                           bool resident)
    {
        if (resident) {
            return row_[start];
        }
        this->LoadInput(weight, offset, count);
        return this->inputQueue_.template DeQue<T>();
    }

    // sum_[0] <- the sum of the row's magnitudes: 64 at a time are added into partial sums, and these 64 at a time
    // until one is left. With kAbsmax also threshold_[0] <- the largest magnitude, collected in 64 lanes of scale_,
    // which holds no scale yet.
    __aicore__ inline void Sum(const Weight<T>& weight, uint64_t offset, bool resident)
    {
        uint32_t sums = 0;
        if (weight.Has(kAbsmax)) {
            AscendC::Duplicate(this->scale_, 0.0f, kFloatLanes);
        }
        for (uint32_t start = 0; start < weight.segment; start += this->piece_) {
            const uint32_t count = Smaller(this->piece_, weight.segment - start);
            const uint32_t padded = AlignUp(count, kPackedBlock);
            LocalTensor<T> input = Input(weight, offset + start, start, count, resident);
            this->Magnitudes(input, count, padded);
            if (!resident) {
                this->inputQueue_.FreeTensor(input);
            }
            SumRepeats<float>(this->partial_[sums], this->magnitude_, kFloatLanes, padded / kFloatLanes, 8);
            if (weight.Has(kAbsmax)) {
                LargestRepeats(this->folded_, this->magnitude_, kFloatLanes, padded / kFloatLanes, 8);
                Barrier();
                AscendC::Max(this->scale_, this->scale_, this->folded_, padded / kFloatLanes);
            }
            Barrier();
            sums += padded / kFloatLanes;
        }
        if (weight.Has(kAbsmax)) {
            LargestRepeats(this->threshold_, this->scale_, kFloatLanes, 1, 8);
        }
        LocalTensor<float> from = this->partial_;
        LocalTensor<float> to = this->folded_;
        while (sums > kFloatLanes) {
            const uint32_t whole = sums / kFloatLanes;
            const uint32_t tail = sums % kFloatLanes;
            SumRepeats<float>(to, from, kFloatLanes, whole, 8);
            if (tail != 0) {
                SumRepeats<float>(to[whole], from[whole * kFloatLanes], tail, 1, 8);
            }
            Barrier();
            sums = whole + (tail != 0 ? 1 : 0);
            const LocalTensor<float> summed = from;
            from = to;
            to = summed;
        }
        SumRepeats<float>(this->sum_, from, sums, 1, 8);
        Barrier();
    }

    LocalTensor<T> row_;
};

template <typename T>
__aicore__ inline void RunRows(GM_ADDR table)
{
    AscendC::TPipe pipe;
    RowKernel<T> kernel(table, &pipe);
    kernel.Process();
}

}  // namespace ternary
