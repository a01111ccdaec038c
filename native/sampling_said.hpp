// What a history says of single ids: whether it has them, and how often. Knows no logits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sampling_block.hpp"

namespace twodice {

// One walk through the history answers for all ids that were asked for. They are few, so most tokens are dismissed by
// their block, and that without a branch, which nobody could predict.
class Said {
   public:
    void begin(int64_t blocks) {
        slot_.resize(blocks);
        wanted_.assign(blocks, 0);
        if (asked_.size() < static_cast<size_t>(kWords * blocks)) asked_.resize(kWords * blocks);
        slots_ = 0;
    }

    void ask(uint32_t id) {
        const uint32_t b = id / kBlock;
        if (!wanted_[b]) {
            wanted_[b] = 1;
            slot_[b] = slots_++;
            std::fill_n(&asked_[kWords * b], kWords, uint64_t{0});
        }
        asked_[id / 64] |= bit_of(id);
    }

    // Answers from past[first, last), of which the tokens from `text` on are counted.
    void look(const int64_t* past, int64_t first, int64_t text, int64_t last) {
        has_.assign(kWords * slots_, 0);
        if (times_.size() < static_cast<size_t>(kBlock * slots_)) times_.resize(kBlock * slots_);
        count(past + first, text - first, [](int32_t) { return 0; });
        count(past + text, last - text, [](int32_t n) { return n + 1; });
    }

    // Of an id that was asked for: whether the history has it; and if so, how often the text.
    bool has(uint32_t id, int32_t& times) const {
        const uint32_t place = place_of(id);
        times = times_[place];
        return (has_[place / 64] & bit_of(place)) != 0;
    }

   private:
    static constexpr int64_t kWords = kBlock / 64;

    static uint64_t bit_of(uint32_t id) { return uint64_t{1} << (id % 64); }  // or of a place
    uint32_t place_of(uint32_t id) const { return slot_[id / kBlock] * kBlock + id % kBlock; }

    template <class Next>
    void count(const int64_t* past, int64_t size, Next next) {
        const uint8_t* const wanted = wanted_.data();
        const uint64_t* const asked = asked_.data();
        for (int64_t from = 0; from < size; from += 64) {
            const int64_t* const tokens = past + from;
            const int64_t n = size - from < 64 ? size - from : 64;
            uint64_t mask = 0;
            auto find = [&](int64_t j) { mask |= uint64_t{wanted[static_cast<uint32_t>(tokens[j]) / kBlock]} << j; };
            if (n == 64) {
#pragma GCC unroll 8
                for (int64_t j = 0; j < 64; ++j) find(j);
            } else {
                for (int64_t j = 0; j < n; ++j) find(j);
            }
            for (; mask != 0; mask &= mask - 1) {
                const uint32_t id = static_cast<uint32_t>(tokens[__builtin_ctzll(mask)]);
                if ((asked[id / 64] & bit_of(id)) == 0) continue;
                const uint32_t place = place_of(id);
                times_[place] = next(has_[place / 64] & bit_of(place) ? times_[place] : 0);
                has_[place / 64] |= bit_of(place);
            }
        }
    }

    uint16_t slots_ = 0;
    std::vector<uint16_t> slot_;   // by block that is wanted: where what is known of it stands
    std::vector<uint8_t> wanted_;  // by block: one of its ids was asked for
    std::vector<uint64_t> asked_;  // a bit an id, of blocks that are wanted
    std::vector<uint64_t> has_;    // by slot, a bit an id
    std::vector<int32_t> times_;   // by slot and id, where its bit is set
};

}  // namespace twodice
