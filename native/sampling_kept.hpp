// What is kept of a row, and sums over it. A part of sampling_level.hpp.
//
// Every stage keeps a contiguous range of the rank order (value, then id). What is kept is either such a range, given by
// the key of its first token (`roof_`, where that is not the row's first) and a number that is not above the key of its
// last (`cut_`), or an explicit list of keys.

template <class F>
class Kept : public Row<F> {
   protected:
    using Base = Row<F>;
    using typename Base::O;
    using typename Base::Key;
    using typename Base::Bits;
    using Base::x_, Base::n_, Base::max_, Base::maxima, Base::buffers, Base::hold, Base::hold_all, Base::key,
        Base::index, Base::least_of, Base::block_count, Base::block_end, Base::waiting_, Base::waits,
        Base::reached_by;
    static constexpr int64_t kChunk = 256;
    static_assert(kChunk % kBlock == 0, "a chunk is whole blocks");

    using Base::Base;

    std::vector<Key>& list() const { return buffers().keys; }
    double z_of(F x) const { return (static_cast<double>(x) - top_) / temperature_; }
    double z_of(Key k) const { return z_of(x_[index(k)]); }
    bool whole() const { return !have_list_ && cut_ == 0 && roof_ == kNoRoof; }
    bool in_range(Key k) const { return k >= cut_ && k <= roof_; }

    // Calls fn(values, count) over everything that is kept, in chunks; what is not kept is -inf there.
    template <class Fn>
    void for_kept(Fn fn) const {
        F chunk[kChunk];
        if (have_list_) {
            const auto& keys = list();
            const int64_t size = static_cast<int64_t>(keys.size());
            for (int64_t begin = 0; begin < size; begin += kChunk) {
                const int64_t count = size - begin < kChunk ? size - begin : kChunk;
                for (int64_t j = 0; j < count; ++j) chunk[j] = x_[index(keys[begin + j])];
                fn(chunk, count);
            }
            return;
        }
        for (int64_t begin = 0; begin < n_; begin += kChunk) {
            const int64_t count = n_ - begin < kChunk ? n_ - begin : kChunk;
            for (int64_t b = begin / kBlock; b * kBlock < begin + count; ++b) hold(b);
            if (whole()) {
                fn(x_ + begin, count);
                continue;
            }
            for (int64_t j = 0; j < count; ++j) {
                const F x = x_[begin + j];
                chunk[j] = in_range(key(x, static_cast<uint32_t>(begin + j))) ? x : static_cast<F>(-INFINITY);
            }
            fn(chunk, count);
        }
    }

    int64_t total() const {
        int64_t sum = 0;
        for_kept([&](const F* x, int64_t count) {
            int64_t weight[kChunk];
            weigh<F>(x, count, top_, temperature_, weight);
            for (int64_t j = 0; j < count; ++j) sum += weight[j];
        });
        return sum;
    }

    static double log_of(int64_t mass) { return noise_log(static_cast<double>(mass) * 0x1p-42); }
    double log_total() const { return log_of(total()); }

    struct Moments {
        int64_t mass = 0, moment = 0;
        double log_total = 0, entropy = 0;
    };

    Moments moments() const {
        Moments out;
        for_kept([&](const F* x, int64_t count) {
            int64_t weight[kChunk], moment[kChunk];
            weigh_moments<F>(x, count, top_, temperature_, weight, moment);
            for (int64_t j = 0; j < count; ++j) out.mass += weight[j], out.moment += moment[j];
        });
        out.log_total = log_of(out.mass);
        out.entropy = out.log_total + static_cast<double>(out.moment) / static_cast<double>(out.mass);
        return out;
    }

    // Everything that is kept as a list, unsorted.
    void make_list() {
        if (have_list_) return;
        collect(cut_value(), list(), roof_ == kNoRoof ? INFINITY : O::value(static_cast<Bits>(roof_ >> 32)));
        keep_if([&](Key k) { return in_range(k); });
        have_list_ = true;
        sorted_ = false;
    }

    // The least value that a kept token may have.
    F cut_value() const { return cut_ == 0 ? static_cast<F>(-INFINITY) : O::value(static_cast<Bits>(cut_ >> 32)); }

    template <class Stays>
    void keep_if(Stays stays) {
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return !stays(k); }), keys.end());
    }

    void drop_below(Key least) {
        keep_if([&](Key k) { return k >= least; });
    }

    // The first of what is kept.
    Key first() const {
        if (have_list_) return *std::max_element(list().begin(), list().end());
        return roof_ == kNoRoof ? key(max_, this->first_index()) : roof_;
    }

    // Keep keys from `least` on, which is not above the first.
    void keep_from(Key least) {
        if (have_list_) {
            drop_below(least);
            return;
        }
        if (least > cut_) cut_ = least;
        shrink();
    }

    // A list in the place of a range where little of the row is left, for stages that look at all of it.
    void thin() {
        if (have_list_ || whole()) return;
        hold_all();
        if (8 * count_from(x_, n_, cut_value()) <= n_) make_list();
    }

    // A list in the place of a cut where few blocks reach it.
    void shrink() {
        if (count_from(maxima().data(), block_count(), cut_value()) <= 64) make_list();
    }

    // The least value for which a condition holds that holds for `top` and, with a value, for all between the two; by
    // bisection over the ordered bits of the floats. The lowest number says that it holds for everything that lives.
    template <class Holds>
    static F least_where(F top, Holds holds) {
        constexpr F kLowest = std::numeric_limits<F>::lowest();
        Bits low = O::ordered(kLowest), high = O::ordered(top);
        if (holds(kLowest)) return kLowest;
        while (high - low > 1) {
            const Bits middle = low + (high - low) / 2;
            (holds(O::value(middle)) ? high : low) = middle;
        }
        return O::value(high);
    }

    // Keep the tokens whose z satisfies a condition that holds for a prefix, and at least the first.
    template <class Holds>
    void keep_where(Holds holds) {
        const F top = static_cast<F>(top_);
        if (!holds(z_of(top))) {
            keep_from(first());
            return;
        }
        const F least = least_where(top, [&](F x) { return holds(z_of(x)); });
        if (least > std::numeric_limits<F>::lowest()) keep_from(least_of(least));
    }

    // `ties` keeps the equals of the first, whose z is 0, where none reaches the limit.
    void least(double log_least, double log_sum, bool ties) {
        if (ties && log_least > -log_sum) log_least = -log_sum;
        keep_where([&](double z) { return z - log_sum >= log_least; });
    }

    // Every living key whose value is at least `low`, and at most `high`, in order of index.
    void collect(F low, std::vector<Key>& out, F high = INFINITY) const {
        out.clear();
        add_collected(low, out, high);
    }

    void add_collected(F low, std::vector<Key>& out, F high) const {
        for (int64_t b = 0; b < block_count(); ++b)
            if (maxima()[b] >= low) collect_block(b, low, high, out);
    }

    void collect_block(int64_t b, F low, F high, std::vector<Key>& out) const {
        hold(b);
        low = std::max(low, std::numeric_limits<F>::lowest());  // what lives
        this->list_block(x_ + b * kBlock, b, low, high, out);
    }

    // The `count` first keys of the rank order, unsorted; fewer where fewer live. What `count` maxima of blocks reach, so
    // many values reach: only blocks that reach it are read again. Where there are fewer blocks, the values themselves tell.
    void select(int64_t count, std::vector<Key>& out) {
        F bound = -INFINITY;
        if (count > block_count()) {
            hold_all();
            bound = reached_by(count, x_, n_);
        } else {
            for (bool sure = false; !sure;) {
                bound = reached_by(count, maxima().data(), block_count());
                sure = true;
                if (!waiting_) break;
                for (int64_t b = 0; b < block_count(); ++b) {
                    if (maxima()[b] < bound || !waits(b)) continue;
                    hold(b);
                    sure &= maxima()[b] >= bound;
                }
            }
        }
        collect(bound, out);
        if (static_cast<int64_t>(out.size()) > count) {
            std::nth_element(out.begin(), out.begin() + (count - 1), out.end(), std::greater<Key>());
            out.resize(count);
        }
    }

    void sort_list() {
        if (!sorted_) std::sort(list().begin(), list().end(), std::greater<Key>());
        sorted_ = true;
    }

    // Length of the shortest prefix of the list at which `reached` becomes true, when the shares of tokens are added one by
    // one in order of rank, or the whole length; the list is put so that this prefix stands first. shares(values, count, out)
    // gives them. Halves the part in which the end must lie, without sorting all of it.
    template <class Sum, class Shares, class Reached>
    int64_t prefix(Sum sum, Shares shares, Reached reached) {
        auto& keys = list();
        int64_t low = 0, high = static_cast<int64_t>(keys.size());
        F chunk[kChunk];
        Sum share[kChunk];
        auto share_of = [&](int64_t begin, int64_t count) {
            for (int64_t j = 0; j < count; ++j) chunk[j] = x_[index(keys[begin + j])];
            shares(chunk, count, share);
        };
        while (!sorted_ && high - low > 64) {
            const int64_t middle = low + (high - low) / 2;
            std::nth_element(keys.begin() + low, keys.begin() + middle, keys.begin() + high, std::greater<Key>());
            Sum left = sum;
            for (int64_t begin = low; begin < middle; begin += kChunk) {
                const int64_t count = middle - begin < kChunk ? middle - begin : kChunk;
                share_of(begin, count);
                for (int64_t j = 0; j < count; ++j) left += share[j];
            }
            if (reached(left)) {
                high = middle;
            } else {
                low = middle;
                sum = left;
            }
        }
        if (!sorted_) std::sort(keys.begin() + low, keys.begin() + high, std::greater<Key>());
        for (int64_t j = low; j < high; ++j) {
            share_of(j, 1);
            sum += share[0];
            if (reached(sum)) return j + 1;
        }
        return static_cast<int64_t>(keys.size());
    }

    double top_ = 0, temperature_ = 1;
    static constexpr Key kNoRoof = ~Key{0};
    Key cut_ = 0, roof_ = kNoRoof;
    bool have_list_ = false, sorted_ = false;
};
