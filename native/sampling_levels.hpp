// Where a sum over the rank order of a row comes to its end, without a list of the row: the shares of its tokens are added up
// by level, which is how far they stand below the first; only the level in which the end lies is listed and sorted. A part
// of sampling_level.hpp.

template <class F>
class Levels : public Kept<F> {
   protected:
    using Base = Kept<F>;
    using typename Base::Key;
    using Base::x_, Base::index, Base::kChunk, Base::list, Base::in_range, Base::for_kept, Base::collect,
        Base::keep_if, Base::least_where, Base::prefix, Base::top_, Base::temperature_, Base::sorted_;
    static constexpr int64_t kLevels = 512;
    static constexpr double kOfANat = 16;  // the last level begins 31.9 nats below the first token, where no mass is left

    using Base::Base;

    template <class Sum>
    using Tally = Sum[kLevels];

    static int32_t level_of(double distance) {  // not negative, and in 1 / kOfANat
        return static_cast<int32_t>(distance < kLevels - 1 ? distance : kLevels - 1);
    }

    // By rank: what counts is that a smaller value has no lower level, whatever the temperature.
    auto by_rank() const {
        return [top = top_, steep = std::min(kOfANat / temperature_, 1e300)](F x) {
            return level_of((top - static_cast<double>(x)) * steep);
        };
    }

    // Adds up by level, and all; shares(values, count, out) gives what each token adds, level(value) where to.
    template <class Sum, class Shares, class Level>
    Sum tally(Shares shares, Level level, Tally<Sum>& out) const {
        std::fill_n(out, kLevels, Sum{});
        for_kept([&](const F* x, int64_t count) {
            Sum share[kChunk];
            int32_t levels[kChunk];
            shares(x, count, share);
            for (int64_t j = 0; j < count; ++j) levels[j] = level(x[j]);
            for (int64_t j = 0; j < count; ++j) out[levels[j]] += share[j];
        });
        Sum all{};
        for (const Sum& one : out) all += one;
        return all;
    }

    // The level in which the sum of levels comes to satisfy a condition, and the sum before it; kLevels if it never does.
    template <class Sum, class Reached>
    static int32_t level_reached(const Tally<Sum>& tallied, Reached reached, Sum& before) {
        Sum next{};
        for (int32_t level = 0; level < kLevels; ++level) {
            before = next;
            next += tallied[level];
            if (reached(next)) return level;
        }
        return kLevels;
    }

    // Everything that is kept, without its levels.
    template <class Sum, class Shares>
    Sum sum_of(Shares shares) const {
        Sum all{};
        for_kept([&](const F* x, int64_t count) {
            Sum share[kChunk];
            shares(x, count, share);
            for (int64_t j = 0; j < count; ++j) all += share[j];
        });
        return all;
    }

    // The key of the last token of the shortest prefix at which `reached` becomes true; 0 if it never does.
    template <class Sum, class Shares, class Reached>
    Key end_of(const Tally<Sum>& tallied, Shares shares, Reached reached) {
        Sum sum{};
        const int32_t level = level_reached(tallied, reached, sum);
        if (level == kLevels) return 0;
        const auto level_at = by_rank();
        const F top = static_cast<F>(top_);
        auto least_at = [&](int32_t most) { return least_where(top, [&](F x) { return level_at(x) <= most; }); };
        auto& keys = list();
        collect(least_at(level), keys, level == 0 ? top : least_at(level - 1));
        keep_if([&](Key k) { return in_range(k) && level_at(x_[index(k)]) == level; });
        sorted_ = false;
        const int64_t length = prefix(sum, shares, reached);
        return *std::min_element(keys.begin(), keys.begin() + length);
    }
};
