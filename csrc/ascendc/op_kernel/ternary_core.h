// SPDX-License-Identifier: Apache-2.0
// What the tile kernel and the row kernel share: the table, the buffers, and the arithmetic on one tile.
//
// For a segment w (a group, or a row) of a weight, as bitcpm_megatron/quantization/quantizer.py defines it:
//     s = bf16(max(mean |w|, eps)),    code = sign(w) where |w| > s / 2, else 0,    result = code * s.
// No division by s, and no multiplication with it: the result's bits are the sign bit of w and the bits of s, or zero.
// A segment whose scale is not finite has codes 0 and results NaN.
//
// Every sum is one binary tree over neighbours of the segment, padded with zeros, whatever the tile, the core, or the
// kernel: this is the order in which WholeReduceSum adds, continued upwards.
#pragma once

#include "../op_host/table.h"
#include "vector_ops.h"

namespace ternary {

// A weight's entry in the table.
template <typename T>
struct Weight {
    AscendC::GlobalTensor<uint16_t> input;   // 16-bit words: a load does not look at them, and can pad with 0
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

    // The entries lie behind the cuts.
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
        if ((flags & (kPack | kCount | kCompare | kUnpack)) != 0) {
            pipe_->InitBuffer(codeBuffer_, 2 * codeBytes);
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
        if ((flags & (kPack | kCount | kCompare | kUnpack)) != 0) {
            code_ = codeBuffer_.template Get<half>();
            other_ = code_[piece_];
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

        // What is set here and in BeginWeight is read behind the first barriers of a tile.
        // Whole scalar buffers take part in comparisons, beyond the segments of a tile too.
        AscendC::Duplicate(sum_, 0.0f, maxSegments_);
        // One block each, read again and again by a stride of 0: the sign bit, 1.0, and a digit of each byte.
        if constexpr (sizeof(T) == sizeof(half)) {
            AscendC::Duplicate(signPattern_, static_cast<uint16_t>(0x8000), kBlock / sizeof(uint16_t));
            AscendC::Duplicate(onePattern_, static_cast<uint16_t>(0x3C00), kBlock / sizeof(uint16_t));
        } else {
            AscendC::Duplicate(signPattern_.ReinterpretCast<uint32_t>(), 0x80000000u, kBlock / sizeof(uint32_t));
            AscendC::Duplicate(onePattern_.ReinterpretCast<uint32_t>(), 0x3F800000u, kBlock / sizeof(uint32_t));
        }
        AscendC::Duplicate(digitPattern_, static_cast<uint16_t>(0x0303), kBlock / sizeof(uint16_t));
    }

    // ---------------------------------------------------------------------------------------- around the tiles of one

    __aicore__ inline void BeginWeight(const Weight<T>& weight)
    {
        AscendC::Duplicate(epsilon_, weight.epsilon, maxSegments_);
        AscendC::Duplicate(length_, static_cast<float>(weight.segment), maxSegments_);
        if (weight.Has(kCount)) {
            statistics_ = statisticsQueue_.template AllocTensor<int32_t>();
            AscendC::Duplicate(statistics_, 0, kStatisticsWords);
        }
    }

    // Every core has its own slot: no atomics, and the host's sum is exact.
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

    // dst <- 16-bit words, and zeros up to the next 32 bytes.
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

    // scale_ <- the given scales of `segments` segments.
    __aicore__ inline void GivenScales(const Weight<T>& weight, uint64_t first, uint32_t segments)
    {
        LocalTensor<bfloat16_t> given = scaleInQueue_.template AllocTensor<bfloat16_t>();
        LoadWords(given.template ReinterpretCast<uint16_t>(), weight.scales[first], segments);
        scaleInQueue_.EnQue(given);
        LocalTensor<bfloat16_t> ready = scaleInQueue_.template DeQue<bfloat16_t>();
        AscendC::Cast(scale_, ready, RoundMode::CAST_NONE, AlignUp(segments, 8));
        Barrier();
        scaleInQueue_.FreeTensor(ready);
    }

    // scale_ <- the scales of the sums in sum_, which also go to global memory.
    __aicore__ inline void OwnScales(const Weight<T>& weight, uint64_t first, uint32_t segments)
    {
        const uint32_t padded = AlignUp(segments, 8);
        if (weight.reciprocal != 0.0f) {
            AscendC::Muls(sum_, sum_, weight.reciprocal, padded);
        } else {
            AscendC::Div(sum_, sum_, length_, padded);
        }
        Barrier();
        // Not Maxs: what it makes of NaN is not documented, and a NaN must come through.
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

    // From scale_, one 32-byte block per segment: s / 2, the bits of s as T, and NaN where s is not finite, else 0.
    __aicore__ inline void SpreadScales(uint32_t segments)
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

    // ------------------------------------------------------------------------------------------------- arithmetic

    // magnitude_ <- |input| of `padded` elements, zeros beyond `count`: they add nothing and quantize to code 0.
    __aicore__ inline void Magnitudes(const LocalTensor<T>& input, uint32_t count, uint32_t padded)
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

    // output, code_ <- from input and magnitude_, for segments whose blocks are spread.
    __aicore__ inline void Quantize(const Weight<T>& weight, const LocalTensor<T>& input, const LocalTensor<T>& output,
                                    uint32_t segments, uint32_t length, uint32_t padded, bool across)
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
        WithBlocks<Subtract>(magnitude_, thresholdBlocks_, segments, length, across);
        AscendC::And(outputWords, input.template ReinterpretCast<uint16_t>(), signPattern_, lanes, repeats,
                     {1, 1, 0, 8, 8, 0});
        Barrier();
        CompareWith(mask_, magnitude_, 0.0f, AscendC::CMPMODE::GT, padded);
        if (weight.NeedsCodes()) {
            // The sign with 1.0, which becomes the code; fp32 has no other room for it than the magnitudes.
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
        WithBlocks<Unite>(outputWords, valueBlocks_, segments, length * words, across);
        Barrier();
        if constexpr (wide) {
            if (weight.NeedsCodes()) {
                AscendC::Cast(code_, magnitude_, RoundMode::CAST_RINT, padded);
            }
        }
        AscendC::Select(outputBits, mask_, outputBits, static_cast<Bits>(0.0f),
                        AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
        Barrier();
        WithBlocks<Unite>(outputWords, poisonBlocks_, segments, length * words, across);
        if constexpr (Same<T, half>::kValue) {
            // A scale below 2**-25 is 0 in fp16: -0.0 becomes +0.0.
            Barrier();
            AscendC::Adds(output, output, static_cast<half>(0.0f), padded);
        }
        if (weight.Has(kGivenScales)) {
            // An own scale would have told of a NaN; a given one knows nothing of it.
            Barrier();
            AscendC::Select(outputBits, number_, outputBits, NotANumber<sizeof(T)>(),
                            AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
        }
    }

    // Packs code_ and stores it: Horner's rule over the four quarters of every 128 codes.
    __aicore__ inline void Pack(const Weight<T>& weight, uint64_t offset, uint32_t padded)
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

    // other_ <- the codes of packed bytes that LoadPrevious has queued.
    __aicore__ inline void Unpack(uint32_t padded)
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

    // statistics_ += how many of other_ are 1, the rest being 0. `kind`: 0 non-zero codes, 1 changed codes.
    __aicore__ inline void CountOnes(uint32_t kind, uint32_t padded)
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

    __aicore__ inline void Count(const Weight<T>& weight, uint32_t padded)
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

    // From scale_, one block of s per segment, for Dequantize: behind the barriers of Unpack.
    __aicore__ inline void SpreadFactors(uint32_t segments)
    {
        AscendC::Brcb(thresholdBlocks_, scale_, AlignUp(segments, 8) / 8, {1, 8});
    }

    // output <- codes in other_ times the scales whose blocks are spread.
    __aicore__ inline void Dequantize(const LocalTensor<T>& output, uint32_t segments, uint32_t length, uint32_t padded,
                                      bool across)
    {
        AscendC::Cast(magnitude_, other_, RoundMode::CAST_NONE, padded);
        Barrier();
        WithBlocks<Multiply>(magnitude_, thresholdBlocks_, segments, length, across);
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
    AscendC::TBuf<AscendC::TPosition::VECCALC> packingBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> digitBuffer_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> countBuffer_;

    LocalTensor<float> magnitude_;           // |w|, then |w| - s / 2
    LocalTensor<uint8_t> mask_;              // |w| > s / 2
    LocalTensor<uint8_t> number_;            // w is a number
    LocalTensor<float> partial_;
    LocalTensor<float> folded_;
    LocalTensor<float> sum_;
    LocalTensor<float> scale_;
    LocalTensor<float> threshold_;
    LocalTensor<float> poison_;              // NaN where the scale is not finite, else 0
    LocalTensor<float> length_;
    LocalTensor<float> epsilon_;
    LocalTensor<T> value_;                   // scales, then poison, as T
    LocalTensor<float> thresholdBlocks_;
    LocalTensor<uint16_t> valueBlocks_;
    LocalTensor<uint16_t> poisonBlocks_;
    LocalTensor<uint16_t> signPattern_;
    LocalTensor<uint16_t> onePattern_;
    LocalTensor<uint16_t> digitPattern_;
    LocalTensor<half> code_;
    LocalTensor<half> other_;                // |codes|, or the codes of packed bytes
    LocalTensor<half> packing_;
    LocalTensor<uint16_t> digits_;
    LocalTensor<int32_t> count_;
    LocalTensor<int32_t> statistics_;

    uint32_t weights_ = 0;
    uint32_t piece_ = 0;
    uint32_t maxSegments_ = 0;
    uint32_t partials_ = 0;
    uint32_t begin_ = 0;
    uint32_t end_ = 0;
    uint32_t firstWeight_ = 0;
};

}  // namespace ternary
