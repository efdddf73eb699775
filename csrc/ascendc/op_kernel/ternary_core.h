// SPDX-License-Identifier: Apache-2.0
// The part that the tile kernel and the row kernel share: the table, the buffers, loading and storing.
//
// For a segment w (a group, or a row) of a weight, as bitcpm_megatron/quantization/quantizer.py defines it:
//     s = bf16(max(m * statistic(|w|), eps)),    code = sign(w) if |w| > s / 2, else 0,    result = code * s,
// where the statistic is the mean or the maximum, and m its multiplier. For ternary there is no division by s, and no
// multiplication by it: the bits of the result are the sign bit of w and the bits of s, or zero. The other spaces are
// in levels.h. A segment whose scale is not finite has the codes 0 and the results NaN.
//
// Every sum is one binary tree over neighbors of the segment, padded with zeros, whatever the tile, the core, or the
// kernel: this is the order in which WholeReduceSum adds, continued upward.
#pragma once

#include "../op_host/table.h"
#include "vector_ops.h"

namespace ternary {

// A weight's entry in the table.
template <typename T>
struct Weight {
    AscendC::GlobalTensor<uint16_t> input;   // as 16-bit words, which a load copies for any T and can pad with 0
    AscendC::GlobalTensor<T> output;
    AscendC::GlobalTensor<uint16_t> scales;
    AscendC::GlobalTensor<uint8_t> packed;
    AscendC::GlobalTensor<uint8_t> previous;
    AscendC::GlobalTensor<int32_t> statistics;
    uint32_t firstTile;
    uint32_t tiles;
    uint32_t flags;
    uint32_t segment;
    uint32_t lineLength;
    uint32_t linePackedBytes;
    uint32_t tilesPerLine;
    uint32_t tileSegments;
    float epsilon;
    float reciprocal;
    float multiplier;

    __aicore__ inline bool Has(uint32_t flag) const { return (flags & flag) != 0; }
    __aicore__ inline bool NeedsCodes() const { return Has(kPack) || Has(kCount) || Has(kCompare); }
};

template <typename T>
class Core {
public:
    __aicore__ inline Core(GM_ADDR table, AscendC::TPipe* pipe) : pipe_(pipe)
    {
        table_.SetGlobalBuffer(reinterpret_cast<__gm__ uint32_t*>(table));
        numbers_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(table));
        weights_ = table_.GetValue(kWeights);
        piece_ = table_.GetValue(kPieceElements);
        maxSegments_ = AlignUp(table_.GetValue(kMaxSegments), kFloatLanes);
        partials_ = AlignUp(table_.GetValue(kPartials), kFloatLanes);
        thresholds_ = table_.GetValue(kThresholds);
        upperTies_ = table_.GetValue(kUpperTies);
        const uint32_t core = static_cast<uint32_t>(AscendC::GetBlockIdx());
        begin_ = table_.GetValue(kHeaderWords + core * kCutWords + kCutTile);
        firstWeight_ = table_.GetValue(kHeaderWords + core * kCutWords + kCutWeight);
        end_ = table_.GetValue(kHeaderWords + (core + 1) * kCutWords + kCutTile);
        if (begin_ < end_) {
            InitBuffers(table_.GetValue(kLaunchFlags), table_.GetValue(kInputBytes), table_.GetValue(kInputBuffers));
        }
    }

protected:
    // ------------------------------------------------------------------------------------------------------ table

    __aicore__ inline GM_ADDR Address(uint32_t word) const
    {
        const uint64_t low = table_.GetValue(word);
        const uint64_t high = table_.GetValue(word + 1);
        return reinterpret_cast<GM_ADDR>(high << 32 | low);
    }

    // The entries follow the cuts.
    __aicore__ inline void ReadWeight(uint32_t index, Weight<T>& weight) const
    {
        const uint32_t blocks = static_cast<uint32_t>(AscendC::GetBlockNum());
        const uint32_t at = kHeaderWords + (blocks + 1) * kCutWords + index * kEntryWords;
        weight.firstTile = table_.GetValue(at + kFirstTile);
        weight.tiles = table_.GetValue(at + kTiles);
        weight.flags = table_.GetValue(at + kFlags);
        weight.segment = table_.GetValue(at + kSegment);
        weight.lineLength = table_.GetValue(at + kLineLength);
        weight.linePackedBytes = table_.GetValue(at + kLinePackedBytes);
        weight.tilesPerLine = table_.GetValue(at + kTilesPerLine);
        weight.tileSegments = table_.GetValue(at + kTileSegments);
        weight.epsilon = numbers_.GetValue(at + kEpsilon);
        weight.reciprocal = numbers_.GetValue(at + kReciprocal);
        weight.multiplier = numbers_.GetValue(at + kMultiplier);
        weight.input.SetGlobalBuffer(reinterpret_cast<__gm__ uint16_t*>(Address(at + kInput)));
        weight.output.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(Address(at + kOutput)));
        weight.scales.SetGlobalBuffer(reinterpret_cast<__gm__ uint16_t*>(Address(at + kScales)));
        weight.packed.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(Address(at + kPacked)));
        weight.previous.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(Address(at + kPrevious)));
        weight.statistics.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(Address(at + kStatistics)));
    }

    // ---------------------------------------------------------------------------------------------------- buffers

    __aicore__ inline void InitBuffers(uint32_t flags, uint32_t inputBytes, uint32_t inputBuffers)
    {
        const uint32_t scalarBytes = maxSegments_ * sizeof(float);
        const uint32_t codeBytes = piece_ * sizeof(half);
        const uint32_t packedBytes = piece_ / 4;
        pipe_->InitBuffer(inputQueue_, inputBuffers, inputBytes);
        pipe_->InitBuffer(outputQueue_, 2, piece_ * sizeof(T));
        pipe_->InitBuffer(scaleOutQueue_, 2, maxSegments_ * sizeof(bfloat16_t));
        pipe_->InitBuffer(magnitudeBuffer_, piece_ * sizeof(float));
        pipe_->InitBuffer(maskBuffer_, 2 * (piece_ / 8));
        pipe_->InitBuffer(partialBuffer_, partials_ * sizeof(float));
        pipe_->InitBuffer(foldedBuffer_, AlignUp(partials_ / kFloatLanes, kFloatLanes) * sizeof(float));
        pipe_->InitBuffer(scalarBuffer_, 6 * scalarBytes);
        pipe_->InitBuffer(blockBuffer_, 3 * maxSegments_ * kBlock);
        pipe_->InitBuffer(patternBuffer_, 3 * kBlock);
        if (sizeof(T) == sizeof(half)) {
            pipe_->InitBuffer(valueBuffer_, 2 * maxSegments_ * sizeof(T));
        }
        if ((flags & kGivenScales) != 0) {
            pipe_->InitBuffer(scaleInQueue_, 2, maxSegments_ * sizeof(bfloat16_t));
        }
        if ((flags & kCodes) != 0) {
            pipe_->InitBuffer(codeBuffer_, 2 * codeBytes);
        } else if ((flags & kLevels) != 0) {
            pipe_->InitBuffer(codeBuffer_, codeBytes);
        }
        if ((flags & kLevels) != 0 && sizeof(T) == sizeof(half)) {
            pipe_->InitBuffer(exactBuffer_, piece_ * sizeof(float));
        }
        if ((flags & kPack) != 0) {
            pipe_->InitBuffer(packedQueue_, 2, packedBytes);
            pipe_->InitBuffer(packingBuffer_, packedBytes * sizeof(half));
        }
        if ((flags & (kCompare | kUnpack)) != 0) {
            pipe_->InitBuffer(previousQueue_, 2, packedBytes);
            pipe_->InitBuffer(digitBuffer_, 4 * packedBytes);
        }
        if ((flags & kCount) != 0) {
            pipe_->InitBuffer(statisticsQueue_, 1, kStatisticsWords * sizeof(int32_t));
            pipe_->InitBuffer(countBuffer_, kStatisticsLanes * (sizeof(half) + sizeof(int32_t)));
        }

        magnitude_ = magnitudeBuffer_.template Get<float>();
        mask_ = maskBuffer_.template Get<uint8_t>();
        number_ = mask_[piece_ / 8];
        partial_ = partialBuffer_.template Get<float>();
        folded_ = foldedBuffer_.template Get<float>();
        sum_ = scalarBuffer_.template Get<float>();
        scale_ = sum_[maxSegments_];
        threshold_ = sum_[2 * maxSegments_];
        poison_ = sum_[3 * maxSegments_];
        length_ = sum_[4 * maxSegments_];
        epsilon_ = sum_[5 * maxSegments_];
        thresholdBlocks_ = blockBuffer_.template Get<float>();
        valueBlocks_ = thresholdBlocks_[maxSegments_ * (kBlock / sizeof(float))].template ReinterpretCast<uint16_t>();
        poisonBlocks_ = valueBlocks_[maxSegments_ * (kBlock / sizeof(uint16_t))];
        signPattern_ = patternBuffer_.template Get<uint16_t>();
        onePattern_ = signPattern_[kBlock / sizeof(uint16_t)];
        digitPattern_ = signPattern_[2 * (kBlock / sizeof(uint16_t))];
        if (sizeof(T) == sizeof(half)) {
            value_ = valueBuffer_.template Get<T>();
        }
        if ((flags & (kCodes | kLevels)) != 0) {
            code_ = codeBuffer_.template Get<half>();
            other_ = code_[piece_];
        }
        if ((flags & kLevels) != 0 && sizeof(T) == sizeof(half)) {
            exact_ = exactBuffer_.template Get<float>();
        }
        if ((flags & kPack) != 0) {
            packing_ = packingBuffer_.template Get<half>();
        }
        if ((flags & (kCompare | kUnpack)) != 0) {
            digits_ = digitBuffer_.template Get<uint16_t>();
        }
        if ((flags & kCount) != 0) {
            count_ = countBuffer_.template Get<int32_t>();
        }

        // Values set here and in BeginWeight are read after the first barriers of a tile.
        // Comparisons cover whole scalar buffers, including the part after the segments of a tile.
        AscendC::Duplicate(sum_, 0.0f, maxSegments_);
        // One block each, read repeatedly with a stride of 0: the sign bit, 1.0, and the mask of one digit in each
        // byte.
        if constexpr (sizeof(T) == sizeof(half)) {
            AscendC::Duplicate(signPattern_, static_cast<uint16_t>(0x8000), kBlock / sizeof(uint16_t));
            AscendC::Duplicate(onePattern_, static_cast<uint16_t>(0x3C00), kBlock / sizeof(uint16_t));
        } else {
            AscendC::Duplicate(signPattern_.ReinterpretCast<uint32_t>(), 0x80000000u, kBlock / sizeof(uint32_t));
            AscendC::Duplicate(onePattern_.ReinterpretCast<uint32_t>(), 0x3F800000u, kBlock / sizeof(uint32_t));
        }
        AscendC::Duplicate(digitPattern_, static_cast<uint16_t>(0x0303), kBlock / sizeof(uint16_t));
    }

    // ------------------------------------------------------------------- before and after the tiles of a weight

    __aicore__ inline void BeginWeight(const Weight<T>& weight)
    {
        AscendC::Duplicate(epsilon_, weight.epsilon, maxSegments_);
        AscendC::Duplicate(length_, static_cast<float>(weight.segment), maxSegments_);
        if (weight.Has(kCount)) {
            statistics_ = statisticsQueue_.template AllocTensor<int32_t>();
            AscendC::Duplicate(statistics_, 0, kStatisticsWords);
        }
    }

    // Every core has its own slot, so that no atomics are needed and the host's sum is exact.
    __aicore__ inline void EndWeight(const Weight<T>& weight)
    {
        if (weight.Has(kCount)) {
            statisticsQueue_.EnQue(statistics_);
            LocalTensor<int32_t> done = statisticsQueue_.template DeQue<int32_t>();
            const uint64_t slot = static_cast<uint64_t>(AscendC::GetBlockIdx()) * kStatisticsWords;
            AscendC::DataCopyPad(weight.statistics[slot], done, {1, kStatisticsWords * sizeof(int32_t), 0, 0, 0});
            statisticsQueue_.FreeTensor(done);
        }
    }

    // -------------------------------------------------------------------------------------------- global memory <-> UB

    // dst <- `words` 16-bit words, and zeros up to the next multiple of 32 bytes.
    __aicore__ inline void LoadWords(const LocalTensor<uint16_t>& dst, const AscendC::GlobalTensor<uint16_t>& src,
                                     uint32_t words)
    {
        const uint32_t padding = AlignUp(words, kBlock / sizeof(uint16_t)) - words;
        AscendC::DataCopyPad(dst, src, {1, static_cast<uint32_t>(words * sizeof(uint16_t)), 0, 0, 0},
                             {padding != 0, 0, static_cast<uint8_t>(padding), static_cast<uint16_t>(0)});
    }

    __aicore__ inline void LoadInput(const Weight<T>& weight, uint64_t offset, uint32_t count)
    {
        constexpr uint32_t words = sizeof(T) / sizeof(uint16_t);
        LocalTensor<T> input = inputQueue_.template AllocTensor<T>();
        LoadWords(input.template ReinterpretCast<uint16_t>(), weight.input[offset * words], count * words);
        inputQueue_.EnQue(input);
    }

    __aicore__ inline void StoreOutput(const Weight<T>& weight, const LocalTensor<T>& output, uint64_t offset,
                                       uint32_t count)
    {
        outputQueue_.EnQue(output);
        LocalTensor<T> done = outputQueue_.template DeQue<T>();
        AscendC::DataCopyPad(weight.output[offset], done, {1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0});
        outputQueue_.FreeTensor(done);
    }

    __aicore__ inline void LoadPrevious(const Weight<T>& weight, uint64_t offset, uint32_t bytes)
    {
        LocalTensor<uint8_t> previous = previousQueue_.template AllocTensor<uint8_t>();
        AscendC::DataCopyPad(previous, weight.previous[offset], {1, bytes, 0, 0, 0},
                             {false, 0, 0, static_cast<uint8_t>(0)});
        previousQueue_.EnQue(previous);
    }

    // ---------------------------------------------------------------------------------------- defined in scales.h

    __aicore__ inline void GivenScales(const Weight<T>& weight, uint64_t first, uint32_t segments);
    __aicore__ inline void OwnScales(const Weight<T>& weight, uint64_t first, uint32_t segments);
    __aicore__ inline void SpreadScales(uint32_t segments);
    __aicore__ inline void SpreadFactors(uint32_t segments);

    // ----------------------------------------------------------------------------------------- defined in codes.h

    __aicore__ inline void Magnitudes(const LocalTensor<T>& input, uint32_t count, uint32_t padded);
    __aicore__ inline void Quantize(const Weight<T>& weight, const LocalTensor<T>& input, const LocalTensor<T>& output,
                                    uint32_t segments, uint32_t length, uint32_t padded, bool across);
    __aicore__ inline void Pack(const Weight<T>& weight, uint64_t offset, uint32_t padded);
    __aicore__ inline void Unpack(uint32_t padded);
    __aicore__ inline void CountOnes(uint32_t kind, uint32_t padded);
    __aicore__ inline void Count(const Weight<T>& weight, uint32_t padded);
    __aicore__ inline void Dequantize(const LocalTensor<half>& levels, const LocalTensor<T>& output, uint32_t segments,
                                      uint32_t length, uint32_t padded, bool across);

    // ---------------------------------------------------------------------------------------- defined in levels.h

    __aicore__ inline void FindLevels(const LocalTensor<float>& exact, uint32_t segments, uint32_t length,
                                      uint32_t padded, bool across);
    __aicore__ inline void QuantizeLevels(const Weight<T>& weight, const LocalTensor<T>& input,
                                          const LocalTensor<T>& output, uint32_t segments, uint32_t length,
                                          uint32_t padded, bool across);

    AscendC::TPipe* pipe_;
    AscendC::GlobalTensor<uint32_t> table_;
    AscendC::GlobalTensor<float> numbers_;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> inputQueue_;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> scaleInQueue_;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> previousQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> outputQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> scaleOutQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> packedQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> statisticsQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> magnitudeBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> maskBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> partialBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> foldedBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> scalarBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> valueBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> blockBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> patternBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> codeBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> exactBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> packingBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> digitBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> countBuffer_;

    LocalTensor<float> magnitude_;           // |w|, then |w| - s / 2; in spaces other than ternary w - t s
    LocalTensor<uint8_t> mask_;              // |w| > s / 2; in other spaces: w is not beyond t s
    LocalTensor<uint8_t> number_;            // w is a number
    LocalTensor<float> partial_;
    LocalTensor<float> folded_;
    LocalTensor<float> sum_;
    LocalTensor<float> scale_;
    LocalTensor<float> threshold_;           // until there are scales: the largest magnitudes
    LocalTensor<float> poison_;              // NaN if the scale is not finite, else 0
    LocalTensor<float> length_;
    LocalTensor<float> epsilon_;
    LocalTensor<T> value_;                   // scales, then poison, as T
    LocalTensor<float> thresholdBlocks_;
    LocalTensor<uint16_t> valueBlocks_;
    LocalTensor<uint16_t> poisonBlocks_;
    LocalTensor<uint16_t> signPattern_;
    LocalTensor<uint16_t> onePattern_;
    LocalTensor<uint16_t> digitPattern_;
    LocalTensor<half> code_;                 // codes; in spaces other than ternary: levels
    LocalTensor<float> exact_;               // w of 16 bits, in fp32
    LocalTensor<half> other_;                // |codes|, or the codes of packed bytes
    LocalTensor<half> packing_;
    LocalTensor<uint16_t> digits_;
    LocalTensor<int32_t> count_;
    LocalTensor<int32_t> statistics_;

    uint32_t weights_ = 0;
    uint32_t piece_ = 0;
    uint32_t maxSegments_ = 0;
    uint32_t partials_ = 0;
    uint32_t thresholds_ = 0;
    uint32_t upperTies_ = 0;
    uint32_t begin_ = 0;
    uint32_t end_ = 0;
    uint32_t firstWeight_ = 0;
};

}  // namespace ternary
