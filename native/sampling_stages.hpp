// Stages 4 to 11 of the chain, each on what the ones before it have kept. A part of sampling_level.hpp. The twin of
// src/twodice/kernels/sampling_reference.py.

template <class F>
class Stages : public Kept<F> {
   protected:
    using Base = Kept<F>;
    using typename Base::Moments;
    using typename Base::O;
    using typename Base::Key;
    using typename Base::Bits;
    using Base::s_, Base::job_, Base::x_, Base::n_, Base::max_, Base::wide_max_, Base::maxima, Base::hold,
        Base::hold_all, Base::key, Base::index, Base::block_count, Base::block_end, Base::argmax, Base::kChunk,
        Base::list, Base::z_of, Base::whole, Base::for_kept, Base::total, Base::log_of, Base::log_total,
        Base::moments, Base::make_list, Base::drop_below, Base::first, Base::keep_from, Base::keep_where, Base::least,
        Base::collect, Base::collect_block, Base::select, Base::sort_list, Base::prefix, Base::top_,
        Base::temperature_, Base::cut_, Base::have_list_, Base::sorted_;

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
        if (cut_ != 0) {
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

    // Length of the shortest prefix of the list whose mass reaches `need`, or the whole length.
    int64_t mass_prefix(int64_t need) {
        return prefix(
            int64_t{0},
            [&](int64_t& sum, const F* x, int64_t count) {
                int64_t weight[kChunk];
                weigh<F>(x, count, top_, temperature_, weight);
                for (int64_t j = 0; j < count; ++j) sum += weight[j];
            },
            [&](int64_t sum) { return sum >= need; });
    }

    void top_p(double p, bool joint) {
        if (whole() && !joint) {
            top_p_whole(p);
            return;
        }
        if (!joint) {
            make_list();
            list().resize(mass_prefix(need_of(p, total())));
            return;
        }
        hold_all();
        int64_t all = 0;
        for (int64_t begin = 0; begin < n_; begin += kChunk) {
            int64_t weight[kChunk];
            const int64_t count = n_ - begin < kChunk ? n_ - begin : kChunk;
            weigh<F>(x_ + begin, count, wide_max_, temperature_, weight);
            for (int64_t j = 0; j < count; ++j) all += weight[j];
        }
        make_list();
        list().resize(mass_prefix(need_of(p, all) + 1));  // a prefix that reaches the need exactly has one token more
    }

    // ---- top-p over a whole row, without a list of it ----

    static constexpr int64_t kSample = 1024, kSampled = 4 * kSample;  // tokens of a sample, and of a row that has one
    static constexpr int64_t kHead = 64;                             // tokens that often hold the mass

    // The exact prefix. A sample of the row says between which two values the cut will lie; one pass adds up the masses of
    // all, of what stands above this window, and collects what is in it. Where the cut is not there after all, the window
    // becomes the rest of the row.
    void top_p_whole(double p) {
        hold_all();
        if (n_ < kSampled && short_top_p(p)) return;
        F low, high;
        window(p, low, high);
        auto& keys = list();
        for (;;) {
            int64_t all = 0, above = 0;
            keys.clear();
            for (int64_t b = 0; b < block_count(); ++b) {
                int64_t weight[kBlock];
                const int64_t begin = b * kBlock, count = block_end(b) - begin;
                weigh<F>(x_ + begin, count, top_, temperature_, weight);
                int64_t sum = 0, over = 0;
                for (int64_t j = 0; j < count; ++j) sum += weight[j];
                if (maxima()[b] > high)
                    for (int64_t j = 0; j < count; ++j) over += x_[begin + j] > high ? weight[j] : 0;
                all += sum, above += over;
                if (maxima()[b] >= low) collect_block(b, low, high, keys);
            }
            const int64_t need = need_of(p, all);
            have_list_ = true;
            sorted_ = false;
            const int64_t inside = above < need ? total() : 0;
            if (above < need && above + inside >= need) {
                const int64_t length = mass_prefix(need - above);
                const Key last = *std::min_element(keys.begin(), keys.begin() + length);
                have_list_ = false;
                keep_from(last);
                return;
            }
            have_list_ = false;
            low = -INFINITY;
            high = max_;
        }
    }

    // The same in a short row, if a few tokens hold the mass.
    bool short_top_p(double p) {
        const int64_t need = need_of(p, total());
        select(kHead, list());
        have_list_ = true;
        sort_list();
        auto& keys = list();
        int64_t sum = 0;
        for (size_t length = 0; length < keys.size();) {
            sum += noise_weight(z_of(keys[length++]));
            if (sum < need) continue;
            keys.resize(length);
            return true;
        }
        have_list_ = sorted_ = false;
        return false;
    }

    // Between which values the cut lies, by a sample of at most 1,024 tokens: half of the window's mass to each side of the
    // need, by far more than the sample is likely to be wrong by.
    void window(double p, F& low, F& high) const {
        low = -INFINITY;
        high = max_;
        if (n_ < kSampled) return;
        F values[kSample];
        int64_t weight[kSample];
        const int64_t step = n_ / kSample;
        for (int64_t j = 0; j < kSample; ++j) values[j] = x_[j * step];
        std::sort(values, values + kSample, std::greater<F>());
        weigh<F>(values, kSample, top_, temperature_, weight);
        double all = 0, sum = 0;
        for (const int64_t w : weight) all += static_cast<double>(w);
        if (!(all > 0)) return;
        const double margin = 0.06;
        bool open = true;
        for (int64_t j = 0; j < kSample; ++j) {
            sum += static_cast<double>(weight[j]);
            if (open && sum >= (p - margin) * all) {
                if (j > 0 && p > margin) high = values[j - 1];
                open = false;
            }
            if (sum > (p + margin) * all) {
                low = values[j];
                return;
            }
        }
    }

    void top_h(double share) {
        const Moments all = moments();
        auto part = [&](const Moments& m) {
            return static_cast<double>(m.mass) * all.log_total + static_cast<double>(m.moment);
        };
        const double most = share * part(all);
        make_list();
        const int64_t size = static_cast<int64_t>(list().size());
        int64_t length = prefix(
            Moments{},
            [&](Moments& sum, const F* x, int64_t count) {
                int64_t weight[kChunk], moment[kChunk];
                weigh_moments<F>(x, count, top_, temperature_, weight, moment);
                for (int64_t j = 0; j < count; ++j) sum.mass += weight[j], sum.moment += moment[j];
            },
            [&](const Moments& sum) { return part(sum) > most; });
        // The token that goes beyond the limit goes, unless the whole list stayed within it.
        if (length < size || part(all) > most) --length;
        auto& keys = list();
        keys.resize(length < 1 ? 1 : length);
        const Key head = first();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k != head && noise_weight(z_of(k)) == 0; }),
                   keys.end());
    }

    void typical(double p) {
        const Moments all = moments();
        make_list();
        auto& found = s_.distances;
        found.clear();
        for (const Key k : list()) {
            const double z = z_of(k);
            found.push_back({std::fabs((all.log_total - z) - all.entropy), noise_weight(z)});
        }
        const int64_t need = need_of(p, all.mass);
        auto nearer = [](const Distance& a, const Distance& b) { return a.distance < b.distance; };
        int64_t low = 0, high = static_cast<int64_t>(found.size()), sum = 0;
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
        const double last = found[low < high ? low : high - 1].distance;
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(),
                                  [&](Key k) { return !(std::fabs((all.log_total - z_of(k)) - all.entropy) <= last); }),
                   keys.end());
        renew_top();
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
        const int64_t all = total();
        const double log_sum = log_of(all);
        make_list();
        Key last = ~Key{0};  // the least probable of the likely
        int64_t likely = 0;
        for (const Key k : list()) {
            if (!(z_of(k) - log_sum >= set.log_xtc_threshold)) continue;
            ++likely;
            last = k < last ? k : last;
        }
        if (likely < 2) return;
        if (expected && p < 1.0) {
            int64_t gone = 0;
            for (const Key k : list())
                if (k > last) gone += noise_weight(z_of(k));
            const double sum = static_cast<double>(all), stays = 1.0 - p;
            mixed_ = last;
            shift_ = noise_log(stays);
            rest_ = noise_log(stays + p / ((sum - static_cast<double>(gone)) / sum));
            return;
        }
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k > last; }), keys.end());
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
