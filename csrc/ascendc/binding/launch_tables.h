// SPDX-License-Identifier: Apache-2.0
// The tables of launches on the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Stream.h>

#include <cstring>
#include <iterator>
#include <list>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ternary {

// Keeps the tables that were copied to the device. The caching allocator hands out the same addresses step after step, so
// that the table of the last step usually serves again, without a copy. A table serves the stream that it was copied on
// and no other: the stream itself then orders its copy, its launches, and what its memory is used for after it was
// dropped. (With tables for all streams that would take an event per copy and `record_stream` per launch.)
class LaunchTables {
public:
    // Never destroyed: when static objects are, at exit, the runtime of the device may be gone, and memory of the device
    // can no longer be freed.
    static LaunchTables& Get()
    {
        static LaunchTables* const tables = new LaunchTables;
        return *tables;
    }

    // The table with these words, for a launch on `stream`, which has to be the current one.
    //
    // While a graph is captured nothing is copied, for the copy would become a part of the graph and read its source
    // again at every replay: a table that is not here is an error. Streams do not matter then, since a capture begins
    // with a wait for the whole device; and the table stays for good, since the graph holds its address.
    at::Tensor Find(const std::vector<uint32_t>& words, const c10::Stream& stream, bool capturing)
    {
        const std::lock_guard<std::mutex> guard(mutex_);
        const std::size_t hash = Hash(words);
        const auto [begin, end] = byHash_.equal_range(hash);
        for (auto candidate = begin; candidate != end; ++candidate) {
            const Place place = candidate->second;
            const bool serves = capturing ? place->stream.device() == stream.device() : place->stream == stream;
            if (serves && place->words == words) {
                Touch(place, capturing);
                return place->tensor;
            }
        }
        TORCH_CHECK(!capturing, "ternary kernels: the table of this launch is not on the device yet, and a graph that is "
                    "being captured must not copy it: run one step on the same weights, with its results in the same "
                    "memory (the graph's pool), before the capture; or quantize outside of the graph");
        recent_.push_front({stream, words, Copy(words, stream.device()), false});
        byHash_.emplace(hash, recent_.begin());
        recentWords_ += words.size();
        Drop();
        return recent_.front().tensor;
    }

private:
    struct Table {
        c10::Stream stream;
        std::vector<uint32_t> words;
        at::Tensor tensor;
        bool captured;
    };
    using Place = std::list<Table>::iterator;

    // 16 MiB: some 34,000 tables of a single weight.
    static constexpr std::size_t kMostWords = 4u << 20;

    static std::size_t Hash(const std::vector<uint32_t>& words)
    {
        return std::hash<std::string_view>()(
            {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint32_t)});
    }

    // From pinned memory and without a wait; the allocator of pinned memory keeps the source until the copy is done.
    static at::Tensor Copy(const std::vector<uint32_t>& words, const c10::Device& device)
    {
        const auto count = static_cast<int64_t>(words.size());
        const at::Tensor source = at::empty({count}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
        std::memcpy(source.data_ptr(), words.data(), words.size() * sizeof(uint32_t));
        at::Tensor table = at::empty({count}, at::TensorOptions().dtype(at::kInt).device(device));
        return table.copy_(source, /*non_blocking=*/true);
    }

    void Touch(Place place, bool capturing)
    {
        if (place->captured) {
            return;
        }
        if (!capturing) {
            recent_.splice(recent_.begin(), recent_, place);
            return;
        }
        place->captured = true;
        recentWords_ -= place->words.size();
        captured_.splice(captured_.begin(), recent_, place);
    }

    // Drops what was not used for the longest time, but never the table that has just come.
    void Drop()
    {
        while (recentWords_ > kMostWords && recent_.size() > 1) {
            const Place oldest = std::prev(recent_.end());
            const auto [begin, end] = byHash_.equal_range(Hash(oldest->words));
            for (auto candidate = begin; candidate != end; ++candidate) {
                if (candidate->second == oldest) {
                    byHash_.erase(candidate);
                    break;
                }
            }
            recentWords_ -= oldest->words.size();
            recent_.erase(oldest);
        }
    }

    std::mutex mutex_;
    std::list<Table> recent_;     // the one used last comes first
    std::list<Table> captured_;   // parts of graphs
    std::unordered_multimap<std::size_t, Place> byHash_;
    std::size_t recentWords_ = 0;
};

}  // namespace ternary
