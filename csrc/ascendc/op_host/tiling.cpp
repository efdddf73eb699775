// SPDX-License-Identifier: Apache-2.0
#include "tiling.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace ternary {
namespace {

constexpr uint32_t kBlock = 32;
constexpr uint32_t kFloatLanes = 64;
constexpr uint32_t kGroupMultiple = 32;
constexpr uint32_t kTileLimit = 4096;                              // a longer segment is processed alone
constexpr uint32_t kRowLimit = kMaxRepeats * kFloatLanes * kFloatLanes;   // one instruction folds its partial sums
constexpr uint32_t kTilePieces[] = {8192, 6144, 4096};
constexpr uint32_t kRowPieces[] = {4096, 2048, 1024};

uint32_t AlignUp(uint32_t value, uint32_t unit)
{
    return (value + unit - 1) / unit * unit;
}

uint32_t Bits(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

uint32_t ElementBytes(Dtype dtype)
{
    return dtype == Dtype::FP32 ? 4 : 2;
}

bool HasCodes(const WeightSpec& w)
{
    return w.packed != 0 || w.previous != 0;
}

uint32_t Flags(const WeightSpec& w, const Space& space)
{
    uint32_t flags = 0;
    auto set = [&flags](bool when, Flag flag) { flags |= when ? static_cast<uint32_t>(flag) : 0u; };
    set(w.givenScales || w.unpack, kGivenScales);
    set(w.unpack, kUnpack);
    set(w.packed != 0, kPack);
    set(w.statistics != 0, kCount);
    set(w.previous != 0 && !w.unpack, kCompare);
    set(w.absmax, kAbsmax);
    set(space.thresholds != 0, kLevels);
    return flags;
}

// The sizes that determine the buffers of one launch in UB.
struct Layout {
    uint32_t piece = 0;
    uint32_t inputBytes = kBlock;
    uint32_t inputBuffers = 2;
    uint32_t partials = 0;
    uint32_t maxSegments = 1;
    uint32_t flags = 0;
};

// Returns the bytes that Core::InitBuffers allocates; a test compares them with those of the emulated kernel.
uint64_t UnifiedBufferBytes(const Layout& layout, Dtype dtype)
{
    const uint64_t element = ElementBytes(dtype);
    const uint64_t piece = layout.piece;
    const uint64_t segments = AlignUp(layout.maxSegments, kFloatLanes);
    const uint64_t partials = AlignUp(layout.partials, kFloatLanes);
    auto whole = [](uint64_t bytes) { return (bytes + kBlock - 1) / kBlock * kBlock; };
    uint64_t bytes = layout.inputBuffers * whole(layout.inputBytes) + 2 * piece * element;
    bytes += 2 * whole(segments * 2) + piece * 4 + whole(piece / 8 * 2) + partials * 4;
    bytes += AlignUp(partials / kFloatLanes, kFloatLanes) * 4;
    bytes += 6 * segments * 4 + 3 * segments * kBlock + 3 * kBlock;
    bytes += element == 2 ? 2 * segments * element : 0;
    bytes += layout.flags & kGivenScales ? 2 * whole(segments * 2) : 0;
    bytes += layout.flags & kCodes ? 2 * piece * 2 : layout.flags & kLevels ? piece * 2 : 0;
    bytes += layout.flags & kLevels && element == 2 ? piece * 4 : 0;
    bytes += layout.flags & kPack ? 2 * whole(piece / 4) + piece / 4 * 2 : 0;
    bytes += layout.flags & (kCompare | kUnpack) ? 2 * whole(piece / 4) + piece : 0;
    bytes += layout.flags & kCount ? kStatisticsWords * 4 + kStatisticsLanes * 6 : 0;
    return bytes;
}

bool Fits(const Layout& layout, Dtype dtype)
{
    return UnifiedBufferBytes(layout, dtype) <= kUnifiedBufferBytes;
}

// The cut of a weight into tiles, which are equal except for the last one of every line.
struct Cut {
    uint32_t lines;
    uint32_t lineLength;
    uint32_t tilesPerLine;
    uint32_t tileSegments;
    bool resident;
    uint32_t Tiles() const { return lines * tilesPerLine; }
};

// Returns whether tiles must not cross the end of a row: packed rows are padded to a multiple of 32 bytes, if a row is
// not a multiple of 128 elements.
bool ByRows(const WeightSpec& w)
{
    return HasCodes(w) && w.columns % kPackedBlock != 0;
}

// Returns false if whole tiles of this size cannot end on blocks of packed bytes.
bool CutTiles(const WeightSpec& w, uint32_t piece, Cut* cut)
{
    const bool byRows = ByRows(w);
    cut->lines = byRows ? w.rows : 1;
    cut->lineLength = byRows ? w.columns : w.rows * w.columns;
    cut->resident = false;
    const uint32_t unit = HasCodes(w) ? std::lcm(w.group, kPackedBlock) / w.group : 1;
    const uint32_t most = std::min(piece / w.group, kMaxRepeats);
    cut->tileSegments = most / unit * unit;
    const uint32_t lineSegments = cut->lineLength / w.group;
    if (lineSegments <= most) {
        cut->tileSegments = lineSegments;
    }
    if (cut->tileSegments == 0) {
        return false;
    }
    cut->tilesPerLine = (lineSegments + cut->tileSegments - 1) / cut->tileSegments;
    return true;
}

uint32_t TilePartials(const WeightSpec& w, const Cut& cut)
{
    const uint32_t columns = AlignUp(w.group, kFloatLanes) / kFloatLanes;
    return w.group <= kAcrossLimit ? columns * AlignUp(cut.tileSegments, 8) : cut.tileSegments * AlignUp(columns, 8);
}

bool TilesWork(const WeightSpec& w)
{
    Cut cut;
    return w.group % kGroupMultiple == 0 && w.group <= kTileLimit && CutTiles(w, kTileLimit, &cut);
}

std::string Check(const WeightSpec& w, const Space& space)
{
    const std::string shape = "[" + std::to_string(w.rows) + ", " + std::to_string(w.columns) + "]";
    if (w.rows == 0 || w.columns == 0) {
        return "an empty weight " + shape;
    }
    if (static_cast<uint64_t>(w.rows) * w.columns > 0x7FFFFFFFu) {
        return "a weight " + shape + " of 2**31 elements or more";
    }
    if (w.group == 0 || w.columns % w.group != 0) {
        return "groups of " + std::to_string(w.group) + " do not divide the rows of a weight " + shape;
    }
    if (w.output == 0 || w.scales == 0 || (!w.unpack && w.input == 0) || (w.unpack && w.previous == 0)) {
        return "an address is missing for a weight " + shape;
    }
    if (w.unpack && (w.packed != 0 || w.statistics != 0)) {
        return "unpacking neither packs nor counts";
    }
    if (space.thresholds != 0 && (Flags(w, space) & kCodes) != 0) {
        return "packing, unpacking and counting know ternary codes alone";
    }
    if (w.previous != 0 && !w.unpack && w.statistics == 0) {
        return "codes to compare with, and nowhere to count the changes";
    }
    if (w.group > kRowLimit) {
        return "segments of " + std::to_string(w.group) + " elements: at most " + std::to_string(kRowLimit);
    }
    if (!TilesWork(w) && HasCodes(w) && w.group != w.columns && w.group % kPackedBlock != 0) {
        return "packed codes with groups of " + std::to_string(w.group) + " in rows of " + std::to_string(w.columns) +
               ": use a multiple of 128, or at most " + std::to_string(kTileLimit / 4);
    }
    return "";
}

void Append(std::vector<uint32_t>* table, uint64_t value)
{
    table->push_back(static_cast<uint32_t>(value));
    table->push_back(static_cast<uint32_t>(value >> 32));
}

Launch WriteTable(Kernel kernel, const std::vector<WeightSpec>& weights, const Space& space,
                  const std::vector<Cut>& cuts, const Layout& layout, Dtype dtype, uint32_t cores)
{
    uint64_t total = 0;
    uint32_t tiles = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        total += static_cast<uint64_t>(cuts[i].Tiles()) * cuts[i].tileSegments * weights[i].group;
        tiles += cuts[i].Tiles();
    }
    Launch launch{kernel, std::min(cores, tiles), static_cast<uint32_t>(UnifiedBufferBytes(layout, dtype)), {}};
    launch.table = {static_cast<uint32_t>(weights.size()), layout.piece, layout.inputBytes, layout.inputBuffers,
                    layout.partials, layout.maxSegments, layout.flags, space.thresholds, space.upperTies};
    for (float threshold : space.threshold) {
        launch.table.push_back(Bits(threshold));
    }
    for (float level : space.level) {
        launch.table.push_back(Bits(level));
    }

    // Core k begins after k / blocks of all elements, so that shares are equal to within a tile.
    uint32_t weight = 0;
    uint32_t first = 0;          // first tile of `weight`
    uint64_t before = 0;         // elements before it
    for (uint32_t k = 0; k <= launch.blocks; ++k) {
        const uint64_t target = total * k / launch.blocks;
        while (weight < weights.size()) {
            const uint64_t all = static_cast<uint64_t>(cuts[weight].Tiles()) * cuts[weight].tileSegments *
                                 weights[weight].group;
            if (target < before + all) {
                break;
            }
            before += all;
            first += cuts[weight].Tiles();
            ++weight;
        }
        uint32_t tile = first;
        if (weight < weights.size()) {
            const uint64_t size = static_cast<uint64_t>(cuts[weight].tileSegments) * weights[weight].group;
            tile += static_cast<uint32_t>((target - before) / size);
        }
        launch.table.push_back(tile);
        launch.table.push_back(weight);
    }

    first = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const WeightSpec& w = weights[i];
        const Cut& cut = cuts[i];
        std::vector<uint32_t>* table = &launch.table;
        for (uint64_t address : {w.input, w.output, w.scales, w.packed, w.previous, w.statistics}) {
            Append(table, address);
        }
        const bool power = (w.group & (w.group - 1)) == 0;
        const uint32_t packedLine = (cut.lineLength + kPackedBlock - 1) / kPackedBlock * kPackedBlockBytes;
        table->insert(table->end(),
                      {first, cut.Tiles(), Flags(w, space) | (cut.resident ? kResident : 0u), w.group, cut.lineLength,
                       packedLine, cut.tilesPerLine, cut.tileSegments, Bits(w.epsilon),
                       power ? Bits(1.0f / static_cast<float>(w.group)) : 0u, Bits(w.multiplier)});
        first += cut.Tiles();
    }
    return launch;
}

Launch PlanTiles(const std::vector<WeightSpec>& weights, const Space& space, Dtype dtype, uint32_t cores,
                 std::string* error)
{
    for (uint32_t piece : kTilePieces) {
        if (dtype == Dtype::FP32 && piece > 4096) {
            continue;
        }
        Layout layout;
        layout.piece = piece;
        std::vector<Cut> cuts(weights.size());
        for (std::size_t i = 0; i < weights.size(); ++i) {
            CutTiles(weights[i], piece, &cuts[i]);
            layout.flags |= Flags(weights[i], space);
            layout.maxSegments = std::max(layout.maxSegments, cuts[i].tileSegments);
            layout.partials = std::max(layout.partials, TilePartials(weights[i], cuts[i]));
            layout.inputBytes = weights[i].unpack ? layout.inputBytes : piece * ElementBytes(dtype);
        }
        if (Fits(layout, dtype)) {
            return WriteTable(Kernel::Tile, weights, space, cuts, layout, dtype, cores);
        }
    }
    *error = "no tile fits the unified buffer";
    return {};
}

Launch PlanRows(const std::vector<WeightSpec>& weights, const Space& space, Dtype dtype, uint32_t cores,
                std::string* error)
{
    Layout layout;
    std::vector<Cut> cuts(weights.size());
    std::vector<uint32_t> lengths;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const WeightSpec& w = weights[i];
        cuts[i] = {w.rows * (w.columns / w.group), w.group, 1, 1, false};
        layout.flags |= Flags(w, space);
        layout.partials = std::max(layout.partials, AlignUp(w.group, kPackedBlock) / kFloatLanes);
        if (!w.givenScales && !w.unpack) {
            lengths.push_back(AlignUp(w.group, kPackedBlock));
        }
    }
    // This finds the longest segment that can stay in UB, with two buffers if possible, so that loading overlaps with
    // computing. Longer segments are read twice.
    std::sort(lengths.rbegin(), lengths.rend());
    lengths.push_back(0);
    for (uint32_t length : lengths) {
        for (uint32_t buffers : {2u, 1u}) {
            for (uint32_t piece : kRowPieces) {
                if (buffers == 1 && length <= piece) {
                    continue;
                }
                layout.piece = piece;
                layout.inputBuffers = buffers;
                layout.inputBytes = std::max(length, piece) * ElementBytes(dtype);
                if (!Fits(layout, dtype)) {
                    continue;
                }
                for (std::size_t i = 0; i < weights.size(); ++i) {
                    const WeightSpec& w = weights[i];
                    cuts[i].resident = !w.givenScales && !w.unpack && AlignUp(w.group, kPackedBlock) <= length;
                }
                return WriteTable(Kernel::Rows, weights, space, cuts, layout, dtype, cores);
            }
        }
    }
    *error = "the partial sums of a row do not fit the unified buffer";
    return {};
}

}  // namespace

uint64_t PackedBytes(uint64_t rows, uint64_t columns)
{
    return rows * ((columns + kPackedBlock - 1) / kPackedBlock * kPackedBlockBytes);
}

Plan MakePlan(const std::vector<WeightSpec>& weights, const Space& space, Dtype dtype, uint32_t cores)
{
    Plan plan;
    if (cores == 0) {
        plan.error = "no cores";
        return plan;
    }
    std::vector<WeightSpec> byKernel[2];
    for (const WeightSpec& w : weights) {
        plan.error = Check(w, space);
        if (!plan.error.empty()) {
            return plan;
        }
        byKernel[TilesWork(w) ? 0 : 1].push_back(w);
    }
    if (!byKernel[0].empty()) {
        plan.launches.push_back(PlanTiles(byKernel[0], space, dtype, cores, &plan.error));
    }
    if (!byKernel[1].empty() && plan.error.empty()) {
        plan.launches.push_back(PlanRows(byKernel[1], space, dtype, cores, &plan.error));
    }
    if (!plan.error.empty()) {
        plan.launches.clear();
    }
    return plan;
}

}  // namespace ternary
