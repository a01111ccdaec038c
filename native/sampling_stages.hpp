// Stages 4 to 11 of the chain, each on what the ones before it have kept. A part of sampling_level.hpp. The twin of
// src/twodice/kernels/sampling_reference.py.

template <class F>
class Stages : public Levels<F> {
   protected:
    using Base = Levels<F>;
    using typename Base::Moments;
    using typename Base::O;
    using typename Base::Key;
    using typename Base::Bits;
    using Base::s_, Base::job_, Base::x_, Base::n_, Base::wide_max_, Base::maxima, Base::hold, Base::hold_all,
        Base::key, Base::index, Base::least_of, Base::block_count, Base::argmax, Base::few_, Base::kChunk, Base::list,
        Base::z_of, Base::whole, Base::in_range, Base::for_kept, Base::total, Base::log_of, Base::log_total,
        Base::moments, Base::make_list, Base::thin, Base::keep_if, Base::drop_below, Base::first, Base::keep_from,
        Base::least_where, Base::keep_where, Base::least, Base::collect, Base::add_collected, Base::select,
        Base::sort_list, Base::prefix, Base::kOfANat, Base::level_of, Base::by_rank, Base::tally,
        Base::level_reached, Base::end_of, Base::top_, Base::temperature_, Base::roof_, Base::have_list_,
        Base::sorted_;
    template <class Sum>
    using Tally = typename Base::template Tally<Sum>;

    using Base::Base;

    void apply(uint8_t stage, const Settings& set, int64_t row) {
        switch (stage) {
            case kTemperature: temperature_ = set.temperature; break;
            case kDynatemp: dynatemp(set); break;
            case kGreedy: greedy(); break;
            case kTopNSigma: top_n_sigma(set.top_n_sigma); break;
            case kTopK: top_k(set.top_k, (set.rules & kTiesAtK) != 0); break;
            case kTopP: top_p(set.top_p, (set.rules & kJoint) != 0); break;
            case kMinP: keep_where([&](double z) { return z >= set.log_min_p; }); break;
            case kTopH:
                if (set.rules & kTopHOf100) top_k(100, false);
                top_h(set.top_h);
                break;
            case kTypical: typical(set.typical_p); break;
            case kEpsilon: least(set.log_epsilon, log_total(), (set.rules & kTiesAtK) != 0); break;
            case kEta: {
                const Moments m = moments();
                const double other = 0.5 * set.log_eta - m.entropy;
                least(set.log_eta < other ? set.log_eta : other, m.log_total, (set.rules & kTiesAtK) != 0);
                break;
            }
            case kXtc: xtc(set); break;
            case kMirostat: mirostat(set, row); break;
        }
    }

    void greedy() {
        uint32_t best;
        if (whole()) {
            best = argmax();
        } else {
            make_list();
            const Bits most = static_cast<Bits>(first() >> 32);
            best = 0xFFFFFFFFu;
            for (const Key k : list())
                if (static_cast<Bits>(k >> 32) == most && index(k) < best) best = index(k);
        }
        only(key(x_[best], best));
        greedy_ = true;
        temperature_ = 1.0;
    }

    void only(Key k) {
        list().assign(1, k);
        have_list_ = sorted_ = true;
        top_ = static_cast<double>(x_[index(k)]);
    }

    int64_t count_kept() const {
        if (have_list_) return static_cast<int64_t>(list().size());
        int64_t count = 0;
        for_kept([&](const F* x, int64_t size) {
            for (int64_t j = 0; j < size; ++j) count += x[j] > -INFINITY;
        });
        return count;
    }

    void dynatemp(const Settings& set) {
        const double low = std::max(set.temperature - set.dynatemp_range, 0.0);
        const double high = set.temperature + set.dynatemp_range;
        const int64_t n = count_kept();
        double found = set.temperature;
        if (n > 1) {
            double share = moments().entropy / noise_log(static_cast<double>(n));
            share = share < 0.0 ? 0.0 : share > 1.0 ? 1.0 : share;
            double power = 0.0;
            if (share >= 0x1p-1022) {
                const double exponent = set.dynatemp_exponent * noise_log(share);
                power = exponent < -700.0 ? 0.0 : noise_exp(exponent);
            }
            if (set.dynatemp_exponent == 0.0) power = 1.0;
            found = low + (high - low) * power;
        }
        if (found == 0.0) {
            only(first());
            greedy_ = true;
            temperature_ = 1.0;
        } else {
            temperature_ = found;
        }
    }

    void top_n_sigma(double n_sigma) {
        int64_t sum = 0, high = 0, low = 0, n = 0;
        for_kept([&](const F* x, int64_t size) {
            for (int64_t j = 0; j < size; ++j) {
                if (!(x[j] > -INFINITY)) continue;
                double u = static_cast<double>(x[j]) - top_;
                u = u > -1024.0 ? u : -1024.0;
                const int64_t q = bits_of<int64_t>(u * 0x1p20 + kRound) - kRoundBits, square = q * q;
                sum += q, high += square >> 32, low += square & 0xFFFFFFFF, ++n;
            }
        });
        const double count = static_cast<double>(n), mean = static_cast<double>(sum) / count;
        const double square = static_cast<double>(high) * 4294967296.0 + static_cast<double>(low);
        const double variance = square / count - mean * mean;
        const double limit = (n_sigma * n_sigma) * (variance > 0.0 ? variance : 0.0) / 0x1p40;
        const double warm = temperature_;
        temperature_ = 1.0;  // the distance of logits, not of z
        keep_where([&](double u) { return u * u <= limit; });
        temperature_ = warm;
    }

    void top_k(int64_t k, bool ties) {
        if (few_) have_list_ = true;  // made when the row was settled
        if (have_list_) {
            auto& keys = list();
            if (k >= static_cast<int64_t>(keys.size())) return;
            if (!sorted_) std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<Key>());
            const Key last = keys[k - 1];
            if (ties) {
                drop_below(last >> 32 << 32);
            } else {
                keys.resize(k);
            }
            return;
        }
        if (k >= n_) return;
        if (!whole()) {
            make_list();
            top_k(k, ties);
            return;
        }
        select(k, list());
        have_list_ = true;
        sorted_ = false;
        if (!ties || static_cast<int64_t>(list().size()) < k) return;
        const Key last = *std::min_element(list().begin(), list().end());
        collect(O::value(static_cast<Bits>(last >> 32)), list());
    }

    static int64_t need_of(double p, int64_t total) {
        const double wanted = std::ceil(p * static_cast<double>(total));
        const int64_t need = wanted < 1.0 ? 1 : static_cast<int64_t>(wanted);
        return need < total ? need : total;
    }

    // The masses of tokens, which a prefix adds up.
    auto masses() const {
        return [this](const F* x, int64_t count, int64_t* out) { weigh<F>(x, count, top_, temperature_, out); };
    }

    void top_p(double p, bool joint) {
        if (whole() && !joint && head_top_p(p)) return;
        top_p_of_row(p, joint);
    }

    // Keeps the shortest prefix whose mass reaches the need, or everything.
    void top_p_of_row(double p, bool joint = false) {
        thin();
        const auto shares = masses();
        Tally<int64_t> tallied;
        int64_t all = have_list_ ? total() : tally(shares, by_rank(), tallied);
        if (joint) all = mass_of_row();
        const int64_t need = need_of(p, all) + joint;  // a joint prefix that reaches the need exactly has one token more
        const auto reached = [need](int64_t sum) { return sum >= need; };
        if (have_list_)
            list().resize(prefix(int64_t{0}, shares, reached));
        else
            keep_from(end_of(tallied, shares, reached));
    }

    // Of everything, whatever is kept.
    int64_t mass_of_row() const {
        hold_all();
        int64_t all = 0;
        for (int64_t begin = 0; begin < n_; begin += kChunk) {
            int64_t weight[kChunk];
            const int64_t count = n_ - begin < kChunk ? n_ - begin : kChunk;
            weigh<F>(x_ + begin, count, wide_max_, temperature_, weight);
            for (int64_t j = 0; j < count; ++j) all += weight[j];
        }
        return all;
    }

    // Keeps the prefix, if the few tokens that have a mass to speak of hold it and say where it ends.
    bool head_top_p(double p) {
        constexpr int64_t kFew = 64;  // blocks, and tokens beside one of so many in the row
        const double small = (1.0 - p) / (8.0 * static_cast<double>(n_));
        // A little lower than `small` is, for the rounding to float32.
        const F bound = static_cast<F>(top_ + temperature_ * (std::log(small) - 1e-4) - 1e-6 * std::fabs(top_));
        int64_t blocks = 0;
        for (int64_t b = 0; b < block_count(); ++b) blocks += maxima()[b] >= bound;
        if (!(small > 0) || blocks > kFew) return false;
        auto& keys = list();
        collect(bound, keys);
        if (static_cast<int64_t>(keys.size()) > kFew + n_ / kFew) return false;  // to sort them takes longer than the draw
        have_list_ = true;
        sorted_ = false;
        sort_list();
        int64_t all = 0, sum = 0;
        for (const Key k : keys) all += noise_weight(z_of(k));
        const double least = p * static_cast<double>(all);
        // A mass that is rounded up has half a unit more than its token.
        const double most = p * (static_cast<double>(all) + (0x1p42 * small + 0.5) * static_cast<double>(n_)) + 1.0;
        for (size_t length = 0; length < keys.size() && static_cast<double>(sum) < most;) {
            if (length > 0 && static_cast<double>(sum) >= least) break;  // may be enough already
            sum += noise_weight(z_of(keys[length++]));
            if (static_cast<double>(sum) < most) continue;
            keys.resize(length);
            return true;
        }
        have_list_ = sorted_ = false;
        return false;
    }

    // A token's mass and its part of the entropy's moment.
    struct Pair {
        int64_t mass = 0, moment = 0;
        void operator+=(const Pair& other) { mass += other.mass, moment += other.moment; }
    };

    void top_h(double share) {
        thin();
        const auto pairs = [this](const F* x, int64_t count, Pair* out) {
            int64_t weight[kChunk], moment[kChunk];
            weigh_moments<F>(x, count, top_, temperature_, weight, moment);
            for (int64_t j = 0; j < count; ++j) out[j] = {weight[j], moment[j]};
        };
        Tally<Pair> tallied;
        const Pair all = have_list_ ? this->template sum_of<Pair>(pairs) : tally(pairs, by_rank(), tallied);
        const double log_sum = log_of(all.mass);
        auto part = [&](const Pair& sum) {
            return static_cast<double>(sum.mass) * log_sum + static_cast<double>(sum.moment);
        };
        const double most = share * part(all);
        const auto beyond = [&](const Pair& sum) { return part(sum) > most; };
        if (beyond(all)) {  // the token that goes beyond the limit goes, but for the first
            const Key top = first();
            Key last;
            if (have_list_) {
                auto& keys = list();
                const int64_t length = prefix(Pair{}, pairs, beyond);
                last = *std::min_element(keys.begin(), keys.begin() + length);
            } else {
                last = end_of(tallied, pairs, beyond);
            }
            keep_from(last == top ? top : last + 1);
        }
        keep_where([](double z) { return noise_weight(z) > 0; });
    }

    // Keeps the tokens whose surprise is nearest to the entropy, until their mass reaches the need.
    void typical(double p) {
        thin();
        const Moments all = moments();
        const int64_t need = need_of(p, all.mass);
        auto above = [&](F x) { return (all.log_total - z_of(x)) - all.entropy; };  // the surprise, above the entropy
        auto& keys = list();
        if (have_list_) {
            const double last = last_of_nearest(need, 0, above);
            keep_if([&](Key k) { return std::fabs(above(x_[index(k)])) <= last; });
            renew_top();
            return;
        }
        auto level_at = [&](double distance) { return level_of(kOfANat * distance); };
        Tally<int64_t> tallied;
        tally(masses(), [&](F x) { return level_at(std::fabs(above(x))); }, tallied);
        int64_t sum = 0;
        const int32_t level = level_reached(tallied, [need](int64_t mass) { return mass >= need; }, sum);
        // `above` falls as values rise, so tokens that are near the entropy are a range, and those of one level two.
        const F top = static_cast<F>(top_);
        auto low_at = [&](int32_t most) {  // the least value whose surprise is not too great
            return least_where(top, [&](F x) { return level_at(std::max(above(x), 0.0)) <= most; });
        };
        auto high_at = [&](int32_t most) {  // the least one whose surprise is too small, or the first
            auto too_small = [&](F x) { return level_at(std::max(-above(x), 0.0)) > most; };
            return too_small(top) ? least_where(top, too_small) : top;
        };
        const F low = low_at(level), high = high_at(level);
        if (level == 0) {
            collect(low, keys, high);
        } else {
            collect(low, keys, std::nextafter(low_at(level - 1), static_cast<F>(-INFINITY)));
            add_collected(high_at(level - 1), keys, high);
        }
        keep_if([&](Key k) { return in_range(k) && level_at(std::fabs(above(x_[index(k)]))) == level; });
        const double last = last_of_nearest(need, sum, above);
        auto too_small = [&](F x) { return above(x) < -last; };
        if (too_small(top)) keep_under(least_where(top, too_small));
        keep_from(least_of(least_where(top, [&](F x) { return above(x) <= last; })));
        renew_top();
    }

    // The distance from the entropy at which the tokens of the list, added to `sum` from the nearest on, reach the need.
    template <class Above>
    double last_of_nearest(int64_t need, int64_t sum, Above above) {
        auto& found = s_.distances;
        found.clear();
        for (const Key k : list()) {
            const F x = x_[index(k)];
            found.push_back({std::fabs(above(x)), noise_weight(z_of(x))});
        }
        auto nearer = [](const Distance& a, const Distance& b) { return a.distance < b.distance; };
        int64_t low = 0, high = static_cast<int64_t>(found.size());
        while (high - low > 64) {
            const int64_t middle = low + (high - low) / 2;
            std::nth_element(found.begin() + low, found.begin() + middle, found.begin() + high, nearer);
            int64_t left = sum;
            for (int64_t j = low; j < middle; ++j) left += found[j].mass;
            if (left >= need) {
                high = middle;
            } else {
                low = middle;
                sum = left;
            }
        }
        std::sort(found.begin() + low, found.begin() + high, nearer);
        while (low < high && (sum += found[low].mass) < need) ++low;
        return found[low < high ? low : high - 1].distance;
    }

    // Keeps what is less than a value; some of it is kept.
    void keep_under(F bound) {
        F most = -INFINITY;
        for_kept([&](const F* x, int64_t count) {
            for (int64_t j = 0; j < count; ++j) {
                const F under = x[j] < bound ? x[j] : static_cast<F>(-INFINITY);
                most = under > most ? under : most;
            }
        });
        collect(most, list(), most);
        keep_if([&](Key k) { return in_range(k); });
        roof_ = *std::max_element(list().begin(), list().end());
    }

    void renew_top() { top_ = static_cast<double>(x_[index(first())]); }

    void xtc(const Settings& set) {
        const double p = set.xtc_probability;
        const bool expected = (set.rules & kXtcExpected) != 0;
        if (!expected) {
            Place at = at_;
            at.purpose = kPurposeXtc;
            if (!(static_cast<double>(uniform64(at, 0, leading16(at, 0)) >> 11) * 0x1p-53 < p)) return;
        }
        thin();
        const int64_t all = total();
        const double log_sum = log_of(all);
        auto likely = [&](F x) { return z_of(x) - log_sum >= set.log_xtc_threshold; };
        const F top = static_cast<F>(top_);
        if (!likely(top)) return;
        if (expected) make_list();
        auto& keys = list();
        if (!have_list_) {
            collect(least_where(top, likely), keys);
            keep_if([&](Key k) { return in_range(k); });
        }
        Key last = ~Key{0};  // the least probable of the likely
        int64_t count = 0, gone = 0;
        for (const Key k : keys) {
            if (!likely(x_[index(k)])) continue;
            ++count;
            last = std::min(k, last);
        }
        if (count < 2) return;
        if (expected && p < 1.0) {
            for (const Key k : keys)
                if (k > last) gone += noise_weight(z_of(k));
            const double sum = static_cast<double>(all), stays = 1.0 - p;
            mixed_ = last;
            shift_ = noise_log(stays);
            rest_ = noise_log(stays + p / ((sum - static_cast<double>(gone)) / sum));
            return;
        }
        if (have_list_)
            keep_if([&](Key k) { return k <= last; });
        else
            roof_ = last;
        renew_top();
    }

    void mirostat(const Settings& set, int64_t row) {
        mu_ = job_.state[row];
        if (mu_ != mu_) mu_ = 2.0 * set.mirostat_tau;
        steered_ = true;
        const double log_sum = log_total(), mu = mu_;
        keep_where([&](double z) { return (log_sum - z) * kLog2E <= mu; });
    }

    // In bits, in the distribution from which it was drawn.
    double surprise_of(Key drawn) const { return (log_total() - final_z(drawn)) * kLog2E; }

    // z after XTC by expectation.
    double final_z(Key k) const { return z_of(k) + (k > mixed_ ? shift_ : rest_); }

    Place at_{};
    Key mixed_ = ~Key{0};  // keys above it pay `shift_`, the others get `rest_`
    double shift_ = 0, rest_ = 0, mu_ = 0;
    bool greedy_ = false, steered_ = false;
};
