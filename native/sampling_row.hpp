// One row of logits, and its values after stages 1 to 3. A part of sampling_level.hpp.
//
// A row is read once whole, for the greatest value of each block. A block is copied, widened and edited when somebody
// reads its values, because most settings read few blocks: penalties wait at their block until then, and as long as they
// wait the block's maximum is the one before them, which is not below the true one.

template <class F>
class Row {
   public:
    Row(const Logits& in, const Job& job, Scratch& scratch) : in_(in), job_(job), s_(scratch) {}

    // ---- for the edits: a function of the value of an id in its place ----

    int64_t size() const { return n_; }

    template <class Fn>
    void change(int64_t id, Fn fn) {
        const int64_t b = id / kBlock;
        hold(b);
        const F before = x_[id], value = fn(before);
        values()[id] = value;
        bring(b, before, value);
    }

    // Penalties on the ids of a history: each waits until its block is read, unless that has happened or one may raise a
    // value.
    void wait(const Penalties<F>& penalties) {
        penalties_ = penalties;
        waiting_ = true;
        if (penalties.lower() && !any_held()) return;
        for (int64_t b = 0; b < block_count(); ++b) {
            if (!waits(b) || (!holds(b) && penalties.lower())) continue;
            if (maxima()[b] == -INFINITY) {  // stays what it is, and a grammar leaves little else
                s_.first_waiting[b] = -1;
                continue;
            }
            hold(b);
            if (waits(b)) penalise(b);  // was held before
        }
    }

    // Bits are 1 where an id may stay; `words` has ceil(n / 32) of them.
    void mask(const uint32_t* words) {
        for (int64_t b = 0; b < block_count(); ++b) {
            const int64_t begin = b * kBlock, count = block_end(b) - begin;
            const uint32_t* const own = words + begin / 32;
            uint32_t all = ~uint32_t{0}, any = 0;
            for (int64_t w = 0; w * 32 < count; ++w) {
                // The bits behind the row's end are nobody's.
                const uint32_t there = count - w * 32 < 32 ? (uint32_t{1} << (count - w * 32)) - 1 : ~uint32_t{0};
                all &= own[w] | ~there;
                any |= own[w] & there;
            }
            if (all == ~uint32_t{0}) continue;
            F* const x = values() + begin;
            if (any == 0) {
                std::fill_n(x, count, static_cast<F>(-INFINITY));
                s_.held[b] = 1;
                maxima()[b] = -INFINITY;
                continue;
            }
            hold(b);
            for (int64_t j = 0; j < count; ++j)
                x[j] = (own[j >> 5] >> (j & 31)) & 1u ? x[j] : static_cast<F>(-INFINITY);
            s_.stale[b] = 1;
        }
    }

   protected:
    using O = Order<F>;
    using Key = typename O::Key;
    using Bits = typename O::Bits;

    auto& buffers() const { return s_.template buffers<F>(); }
    F* values() const { return buffers().values.data(); }
    std::vector<F>& maxima() const { return buffers().maxima; }
    static int64_t block_of(int64_t i) { return static_cast<int64_t>(static_cast<uint64_t>(i) / kBlock); }
    int64_t block_count() const { return (n_ + kBlock - 1) / kBlock; }
    int64_t block_end(int64_t b) const { return b * kBlock + kBlock < n_ ? b * kBlock + kBlock : n_; }

    // A key packs (value, place) so that a larger one stands earlier in the rank order.
    Key key(F x, uint32_t i) const { return (static_cast<Key>(O::ordered(x)) << 32) | (i ^ flip_); }
    uint32_t index(Key k) const { return static_cast<uint32_t>(k) ^ flip_; }
    static Key least_of(F x) { return static_cast<Key>(O::ordered(x)) << 32; }  // not above any key of this value
    uint32_t id_of(uint32_t index) const { return ids_ ? static_cast<uint32_t>(ids_[index]) : index; }

    bool holds(int64_t b) const { return all_held_ || s_.held[b]; }
    bool waits(int64_t b) const {
        if (!waiting_) return false;
        if (!chained_) chain();
        return s_.first_waiting[b] >= 0;
    }

    bool any_held() const { return std::memchr(s_.held.data(), 1, s_.held.size()) != nullptr; }

    // x_ may be read in block b.
    void hold(int64_t b) const {
        if (!holds(b)) make(b);
    }

    void hold_all() const {
        if (all_held_) return;
        for (int64_t b = 0; b < block_count(); ++b) hold(b);
        all_held_ = true;
    }

    // The value at a place, of which no other value of its block need be read.
    F value_at(int64_t i) const {
        const int64_t b = block_of(i);
        if (waits(b)) hold(b);
        if (holds(b)) return x_[i];
        if (as_it_lies_) return reinterpret_cast<const F*>(start_)[i];
        if (sizeof(F) == 4 && in_.type == kBfloat16)
            return bits_of<float>(uint32_t{reinterpret_cast<const uint16_t*>(start_)[i]} << 16);
        F value{};
        widen<F>(in_, start_, i, 1, &value);
        return value;
    }

    // The values of a block, for one reading: there, or in `near`, which has room for them.
    const F* peek(int64_t b, F* near) const {
        if (waits(b)) hold(b);
        return holds(b) ? x_ + b * kBlock : as_it_came(b, near);
    }

    const F* as_it_came(int64_t b, F* near) const {
        if (as_it_lies_) return reinterpret_cast<const F*>(start_) + b * kBlock;
        widen<F>(in_, start_, b * kBlock, block_end(b) - b * kBlock, near);
        return near;
    }

    // Adds the keys of a block whose values, at x, lie between two bounds.
    void list_block(const F* x, int64_t b, F low, F high, std::vector<Key>& out) const {
        const int64_t begin = b * kBlock, size = block_end(b) - begin;
        for (int64_t i = 0; i < size; i += 64)
            for (uint64_t mask = within(x + i, std::min<int64_t>(64, size - i), low, high); mask != 0; mask &= mask - 1) {
                const int64_t at = i + __builtin_ctzll(mask);
                out.push_back(key(x[at], static_cast<uint32_t>(begin + at)));
            }
    }

    // A number that at least `count` of `size` reach, and not many more, by bisection over the ordered bits; -inf where
    // fewer live.
    F reached_by(int64_t count, const F* x, int64_t size) const {
        const int64_t enough = count + count / 8;
        Bits low = O::ordered(-INFINITY), high = O::ordered(max_);
        while (high - low > 1) {
            const Bits middle = low + (high - low) / 2;
            const int64_t found = count_from(x, size, O::value(middle));
            (found >= count ? low : high) = middle;
            if (found >= count && found <= enough) break;
        }
        return O::value(low);
    }

    // The lowest index of the greatest value; nothing waits at the first block that has it (take_top).
    uint32_t argmax() const {
        const int64_t b = first_equal(maxima().data(), max_);
        hold(b);
        return static_cast<uint32_t>(b * kBlock + first_equal(x_ + b * kBlock, max_));
    }

    // The first index of the rank order.
    uint32_t first_index() const {
        if (flip_ != 0) return argmax();
        for (int64_t b = block_count() - 1;; --b) {
            if (maxima()[b] == max_) hold(b);
            if (maxima()[b] != max_) continue;
            int64_t i = block_end(b) - 1;
            while (!(x_[i] == max_)) --i;
            return static_cast<uint32_t>(i);
        }
    }

    // Reads a row and runs the edits.
    int open(int64_t row, const Settings& set) {
        begin(row, set);
        bool bad = false;
        read(0, block_count(), bad);
        return settle(row, set, bad);
    }

    // The same in parts: nothing is read yet; some blocks are; all of them were, and `bad` says whether one had a NaN.
    void begin(int64_t row, const Settings& set) {
        flip_ = (set.rules & kHighIdFirst) ? 0u : 0xFFFFFFFFu;
        start_ = in_.data + row * in_.row_bytes;
        n_ = in_.vocabulary;
        joined_ = in_.column_stride == 1;
        as_it_lies_ = joined_ && in_.type == (sizeof(F) == 4 ? kFloat32 : kFloat64);
        edited_ = Edits<F>::wanted(job_, set);
        all_held_ = as_it_lies_ && !edited_;
        if (all_held_) {
            x_ = reinterpret_cast<const F*>(start_);
        } else {
            if (buffers().values.size() < static_cast<size_t>(n_)) buffers().values.resize(n_);
            x_ = values();
            s_.held.assign(block_count(), 0);
        }
        size_maxima();
    }

    void read(int64_t from, int64_t to, bool& bad) {
        F* const out = maxima().data();
        if (as_it_lies_) {
            const F* const x = reinterpret_cast<const F*>(start_);
            for (int64_t b = from; b < to; ++b) out[b] = block_max<F>(x + b * kBlock, block_end(b) - b * kBlock, bad);
            return;
        }
        for (int64_t b = from; b < to; ++b) out[b] = block_maximum(b, bad);
    }

    // The memory of a block, to be asked for; behind the last one there may be the next row.
    Ahead ahead(int64_t b) const {
        const int size = in_.type == kFloat64 ? 8 : in_.type == kFloat32 ? 4 : 2;
        return joined_ ? Ahead{start_ + b * kBlock * size, 64 * size} : Ahead{};
    }

    int settle(int64_t row, const Settings& set, bool bad) {
        if (bad) return kNan;
        take_top();
        if (max_ == INFINITY) return kInfinite;
        if (edited_) {
            s_.stale.assign(block_count(), 0);
            Edits<F>(job_, set, s_, *this, row).run();
            if (set.allowed.begin < set.allowed.end)
                only_ids(set.allowed);
            else
                for (int64_t b = 0; b < block_count(); ++b)
                    if (s_.stale[b]) hold(b), maxima()[b] = maximum_of(x_, b);
            if (!list_few(set)) take_top();
            if (max_ == INFINITY) return kInfinite;
        }
        return max_ == -INFINITY ? kEmpty : kOk;
    }

    const Logits& in_;
    const Job& job_;
    Scratch& s_;
    const char* start_ = nullptr;  // of the logits as they came
    const F* x_ = nullptr;         // the values; to be read in blocks that are held
    const int64_t* ids_ = nullptr;
    int64_t n_ = 0;
    uint32_t flip_ = 0xFFFFFFFFu;
    F max_ = 0;
    double wide_max_ = 0;
    bool edited_ = false;
    bool waiting_ = false;  // there are penalties that may wait
    bool few_ = false;      // the first filter is top-k, and the list has every token that it may keep

   private:
    // The maximum of a block after one of its values has changed, or that it must be taken again.
    void bring(int64_t b, F before, F value) {
        if (value > maxima()[b])
            maxima()[b] = value;
        else if (before == maxima()[b])
            s_.stale[b] = 1;
    }

    void size_maxima() {
        maxima().resize((block_count() / 16 + 2) * 16);  // a vector may begin at any block
        std::fill(maxima().begin() + block_count(), maxima().end(), static_cast<F>(-INFINITY));
    }

    F block_maximum(int64_t b, bool& bad) {
        const int64_t begin = b * kBlock, count = block_end(b) - begin;
        if (!joined_) {  // is not gathered twice
            widen<F>(in_, start_, begin, count, values() + begin);
            s_.held[b] = 1;
            return block_max<F>(x_ + begin, count, bad);
        }
        if (sizeof(F) == 4 && in_.type == kBfloat16)
            return static_cast<F>(block_max16(reinterpret_cast<const uint16_t*>(start_) + begin, count, bad));
        F near[kBlock];
        widen<F>(in_, start_, begin, count, near);
        return block_max<F>(near, count, bad);
    }

    F maximum_of(const F* x, int64_t b) const {
        bool bad = false;  // the logits had no NaN, and edits make none
        return block_max<F>(x + b * kBlock, block_end(b) - b * kBlock, bad);
    }

    void make(int64_t b) const {
        const int64_t begin = b * kBlock;
        widen<F>(in_, start_, begin, block_end(b) - begin, values() + begin);
        s_.held[b] = 1;
        if (waits(b)) penalise(b);
    }

    // The places of the history by the block of their ids.
    void chain() const {
        chained_ = true;
        const int64_t* const ids = penalties_.past;
        auto& next = s_.next_waiting;
        s_.first_waiting.assign(block_count(), -1);
        int32_t* const first = s_.first_waiting.data();
        if (static_cast<int64_t>(next.size()) < penalties_.end) next.resize(penalties_.end);
        for (int64_t j = penalties_.begin; j < penalties_.end; ++j) {
            const int64_t b = block_of(ids[j]);
            next[j] = first[b];
            first[b] = static_cast<int32_t>(j);
        }
    }

    // Runs what waits at a block that is held. A place of the history is looked at once, an id changed once.
    void penalise(int64_t b) const {
        int32_t told[kBlock], place[kBlock] = {};  // how often an id was said; its place in `ids`, counted from 1
        uint8_t ids[kBlock];
        int32_t n = 0;
        for (int32_t j = s_.first_waiting[b]; j >= 0; j = s_.next_waiting[j]) {
            const int64_t id = static_cast<uint64_t>(penalties_.past[j]) % kBlock;
            if (place[id] == 0) ids[n] = static_cast<uint8_t>(id), told[n] = 0, place[id] = ++n;
            told[place[id] - 1] += j >= penalties_.text;
        }
        s_.first_waiting[b] = -1;
        F* const x = values() + b * kBlock;
        F some[kBlock];
        for (int32_t i = 0; i < n; ++i) some[i] = x[ids[i]];
        penalties_.change(some, told, n);
        for (int32_t i = 0; i < n; ++i) x[ids[i]] = some[i];
        maxima()[b] = maximum_of(x_, b);
    }

    // The row of these ids alone; they ascend, so the order of places is the order of ids.
    void only_ids(const List& list) {
        const int64_t count = list.end - list.begin;
        ids_ = job_.ids + list.begin;
        for (int64_t j = 0; j < count; ++j) hold(ids_[j] / kBlock);
        for (int64_t j = 0; j < count; ++j) values()[j] = values()[ids_[j]];
        n_ = count;
        all_held_ = true;
        waiting_ = false;
        size_maxima();
        for (int64_t b = 0; b < block_count(); ++b) maxima()[b] = maximum_of(x_, b);
    }

    // For a program whose first filter is top-k: lists the tokens that it may keep, finds the greatest, and is true. A value
    // that penalties lower is among the first only if it was, so the history is asked for the few ids alone that were, and
    // no block need be held. Where too few of them stay it tries once more, for each try is a walk.
    bool list_few(const Settings& set) {
        const uint8_t stage = set.stages[set.stages[0] == kTemperature];
        if (stage != kTopK || !waiting_ || !penalties_.lower()) return false;
        auto& keys = buffers().keys;
        int64_t count = set.top_k + set.top_k / 4 + 8;
        for (int tries = 0; tries < 2 && count < block_count(); ++tries, count *= 4) {
            const F least = reached_by(count, maxima().data(), block_count());
            if (least == -INFINITY) return false;
            keys.clear();
            auto list_blocks = [&](bool held) {
                F near[kBlock];
                for (int64_t b = 0; b < block_count(); ++b)
                    if (maxima()[b] >= least && holds(b) == held)
                        list_block(held ? x_ + b * kBlock : as_it_came(b, near), b, least, static_cast<F>(INFINITY), keys);
            };
            if (any_held()) list_blocks(true);
            const size_t done = keys.size();
            list_blocks(false);
            penalise_keys(keys, done);
            const Key lowest = least_of(least);
            keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k < lowest; }), keys.end());
            if (static_cast<int64_t>(keys.size()) < set.top_k) continue;
            max_ = O::value(static_cast<Bits>(*std::max_element(keys.begin(), keys.end()) >> 32));
            wide_max_ = static_cast<double>(max_);
            few_ = true;
            return true;
        }
        return false;
    }

    // Keys, from one on, of values as they came, of blocks that nobody holds: runs what waits at them and puts their values
    // in place.
    void penalise_keys(std::vector<Key>& keys, size_t from) {
        s_.said.begin(block_count());
        for (size_t j = from; j < keys.size(); ++j) s_.said.ask(index(keys[j]));
        s_.said.look(penalties_.past, penalties_.begin, penalties_.text, penalties_.end);
        constexpr int64_t kSome = 64;
        for (size_t begin = from; begin < keys.size(); begin += kSome) {
            const int64_t size = std::min<int64_t>(kSome, keys.size() - begin);
            Key* const own = keys.data() + begin;
            F before[kSome], after[kSome];
            int32_t times[kSome];
            bool has[kSome];
            for (int64_t j = 0; j < size; ++j) {
                before[j] = after[j] = O::value(static_cast<Bits>(own[j] >> 32));
                has[j] = s_.said.has(index(own[j]), times[j]);
            }
            penalties_.change(after, times, size);
            for (int64_t j = 0; j < size; ++j) {
                const uint32_t at = index(own[j]);
                const F value = has[j] ? after[j] : before[j];
                values()[at] = value;  // of a block that stays not held: whoever holds it makes it anew
                own[j] = key(value, at);
            }
        }
    }

    // The greatest value after all edits. Each time that a penalty takes it away, twice as many blocks are made.
    void take_top() {
        for (int64_t count = 1;; count *= 2) {
            bool bad = false;
            max_ = block_max<F>(maxima().data(), static_cast<int64_t>(maxima().size()), bad);
            if (!waiting_ || max_ == -INFINITY) break;
            const int64_t b = first_equal(maxima().data(), max_);
            hold(b);
            if (maxima()[b] == max_) break;
            const F likely = reached_by(std::min(count, block_count()), maxima().data(), block_count());
            for (int64_t j = 0; j < block_count(); ++j)
                if (maxima()[j] >= likely && waits(j)) hold(j);
        }
        wide_max_ = static_cast<double>(max_);
    }

    Penalties<F> penalties_;
    bool joined_ = false;      // one value lies behind the other
    bool as_it_lies_ = false;  // and all have type F
    mutable bool all_held_ = false;
    mutable bool chained_ = false;  // the places of the history stand by block
};
