// The draw from what the stages have kept: logits meet their noise. A part of sampling_level.hpp.
//
// The token drawn is the argmax of z plus Gumbel noise, z being (logit - greatest logit) / temperature. Sixteen leading
// bits of a token's noise bound it, so most tokens are dismissed by these, sixty-four at a time; few need the other bits.

template <class F>
class Draw : public Stages<F> {
   protected:
    using Base = Stages<F>;
    using typename Base::Key;
    using Base::s_, Base::job_, Base::x_, Base::ids_, Base::wide_max_, Base::maxima, Base::hold, Base::value_at,
        Base::key, Base::index, Base::id_of, Base::least_of, Base::block_count, Base::block_end, Base::first,
        Base::in_range, Base::list, Base::z_of, Base::top_, Base::temperature_, Base::cut_, Base::final_z, Base::at_;
    using V = Vector16;
    static_assert(kDrawn == 16, "one vector of blocks");
    static_assert(kDrawn * kBlock == kLowGroups * kLowGroup && kBlock == 2 * kLowGroup, "one run of low lanes");
    static constexpr int64_t kTried = 64;  // tokens of a list whose noise is looked at in one go

    using Base::Base;

    static bool mild(double temperature) { return temperature > 1e-4 && temperature < 1e4; }

    // The temperature of a program that has nothing else; a temperature of 1 is not in it.
    static double only_temperature(const Settings& set) { return set.stages[0] == kTemperature ? set.temperature : 1.0; }

    // Whether the draw is from everything, as it comes.
    bool plain(const Settings& set) const {
        const int stages = set.stages[0] == kTemperature;
        return set.stages[stages] == kEnd && mild(only_temperature(set)) && !Edits<F>::wanted(job_, set);
    }

    // Score, then the lower id, which is the lower index.
    struct Best {
        double score = -INFINITY;
        uint32_t index = 0xFFFFFFFFu;
        bool offer(double candidate, uint32_t at) {
            const bool better = candidate > score || (candidate == score && at < index);
            if (better) score = candidate, index = at;
            return better;
        }
    };

    // The greatest lanes with which tokens of kDrawn blocks from one on may reach a score, by their maxima: noise is at
    // most -log(lane / 2^16). In float32, whose rounding the factor covers; what is no number limits nothing,
    // nor does a temperature that may bring back a difference which float32 cannot hold, or whose inverse it cannot.
    void limits(int64_t from, F top, double score, uint16_t* out) const {
        if (temperature_ >= 1e30 || temperature_ < 1e-30) {
            std::fill_n(out, kDrawn, uint16_t{65535});
            return;
        }
        const F* const most = &maxima()[from];
        float odds[kDrawn];
        for (int64_t j = 0; j < kDrawn; ++j) odds[j] = static_cast<float>(most[j] - top);
        const V::F inverse = V::all(static_cast<float>(1.0 / temperature_)), less = V::all(static_cast<float>(score));
        const V::F share = V::exp(V::sub(V::mul(V::load(odds), inverse), less));
        V::store(odds, V::mul(share, V::all(65536.0f * 1.001f)));
        for (int64_t j = 0; j < kDrawn; ++j) {
            const float lane = odds[j] < 65535.0f ? odds[j] : 65535.0f;
            out[j] = static_cast<uint16_t>(static_cast<int32_t>(lane));
        }
    }

    // Makes the noise of at most kDrawn blocks that stand behind each other and calls fn(index, lane) for the lanes that
    // are not above the limit of their block; renew(limits) gives these, and anew after an fn that is true.
    template <class Renew, class Fn>
    void sift(int64_t from, int64_t to, Ahead ahead, Renew renew, Fn fn) const {
        const uint32_t begin = static_cast<uint32_t>(from * kBlock), end = static_cast<uint32_t>(block_end(to - 1));
        alignas(64) uint16_t lanes[kDrawn * kBlock];
        uint16_t most[kDrawn];
        renew(most);
        uint32_t groups = fill_low_lanes(run_, begin >> 3, (end - begin + 7) / 8, most, lanes, ahead);
        for (; groups != 0; groups &= groups - 1) {
            const uint32_t at = kLowGroup * static_cast<uint32_t>(__builtin_ctz(groups));
            uint64_t mask = low_lanes(lanes + at, most[at / kBlock]);
            if (end - begin - at < kLowGroup) mask &= (uint64_t{1} << (end - begin - at)) - 1;
            bool better = false;
            for (; mask != 0; mask &= mask - 1) {
                const uint32_t i = at + static_cast<uint32_t>(__builtin_ctzll(mask));
                better |= fn(begin + i, uint32_t{lanes[i]});
            }
            if (better) renew(most);
        }
    }

    // Draws from everything while the row is read, because the one waits for memory and the other does not. What can be
    // said before the greatest value is known: a token whose noise, by its leading bits, cannot bring it to what another
    // one surely has is not drawn. The few that remain are compared when the row has been read.
    int draw_as_read(int64_t row, const Settings& set, Key& drawn) {
        this->begin(row, set);
        temperature_ = only_temperature(set);
        run_.set_key(at_.key);
        run_.set_row(at_.position, at_.completion, at_.purpose);
        auto& found = s_.candidates;
        found.clear();
        constexpr double kFar = 1000;
        constexpr double kHopeless = -50;  // noise lies between -3.9 and 45.1
        F top = -INFINITY, base = 0;  // the greatest so far; one near it, to which scores are relative
        double least = -INFINITY;     // the score that a token surely has
        bool bad = false;
        auto z_to_base = [&](uint32_t i) {
            return (static_cast<double>(this->value_at(i)) - static_cast<double>(base)) / temperature_;
        };
        auto move_base = [&](F to) {
            least -= (static_cast<double>(to) - static_cast<double>(base)) / temperature_;
            base = to;
            auto gone = [&](Candidate& one) { return !((one.z = z_to_base(one.index)) > kHopeless); };
            found.erase(std::remove_if(found.begin(), found.end(), gone), found.end());
        };
        auto surely = [&](uint32_t i, double z, uint32_t high) {
            found.push_back({i, high, z});
            const double share = (high + 1.0) * 0x1p-16;
            const double score = z - std::log(-std::log1p(-share)) - 1e-6;
            const bool better = score > least;
            if (better) least = score;
            return better;
        };
        for (int64_t from = 0; from < block_count(); from += kDrawn) {
            const int64_t to = std::min(from + kDrawn, block_count());
            this->read(from, to, bad);
            F here = -INFINITY;
            for (int64_t b = from; b < to; ++b) here = maxima()[b] > here ? maxima()[b] : here;
            if (!(here > -INFINITY)) continue;
            if (here > top) {
                if (!(top > -INFINITY) || (static_cast<double>(here) - static_cast<double>(base)) / temperature_ > kFar)
                    move_base(here);
                top = here;
                int64_t b = from;
                while (!(maxima()[b] == here)) ++b;
                hold(b);
                const uint32_t i = static_cast<uint32_t>(b * kBlock + first_equal(x_ + b * kBlock, here));
                surely(i, z_to_base(i), leading16(at_, i));
            }
            sift(
                from, to, this->ahead(to), [&](uint16_t* most) { limits(from, base, least, most); },
                [&](uint32_t i, uint32_t high) {
                    const double z = z_to_base(i);
                    if (!(z + gumbel_bound(high) + 1e-6 >= least)) return false;
                    return surely(i, z, high);
                });
        }
        const int status = this->settle(row, set, bad);
        if (status != kOk) return status;
        top_ = wide_max_;
        Best best;
        for (const Candidate& one : found) {
            if (one.z + gumbel_bound(one.high) + 1e-3 < least) continue;
            const double z = z_of(this->value_at(one.index));
            best.offer(z + gumbel_from_bits(uniform64(at_, one.index, one.high)), one.index);
        }
        hold(best.index / kBlock);
        drawn = key(x_[best.index], best.index);
        return kOk;
    }

    Key draw_list() const {
        Best best;
        const auto& keys = list();
        const int64_t size = static_cast<int64_t>(keys.size());
        for (int64_t begin = 0; begin < size; begin += kTried) {
            const int64_t n = size - begin < kTried ? size - begin : kTried;
            uint32_t ids[kTried], high[kTried];
            double z[kTried], bound[kTried];
            for (int64_t j = 0; j < n; ++j) ids[j] = id_of(index(keys[begin + j])), z[j] = final_z(keys[begin + j]);
            leading_bounds(at_, ids, n, high, bound);
            int64_t likely = 0;  // a good score early lets most others go
            for (int64_t j = 0; j < n; ++j) {
                bound[j] += z[j] + 1e-6;
                likely = bound[j] > bound[likely] ? j : likely;
            }
            auto offer = [&](int64_t j) {
                if (bound[j] < best.score) return;
                best.offer(z[j] + gumbel_from_bits(uniform64(at_, ids[j], high[j])), index(keys[begin + j]));
            };
            offer(likely);
            for (int64_t j = 0; j < n; ++j)
                if (j != likely) offer(j);
        }
        return key(x_[best.index], best.index);
    }

    Key draw_all() {
        run_.set_key(at_.key);
        run_.set_row(at_.position, at_.completion, at_.purpose);
        Best best;
        const uint32_t top = index(first());  // a good score early lets most others go unread
        best.offer(0.0 + gumbel(at_, id_of(top)), top);
        for (int64_t begin = 0; begin < block_count();) {
            // Blocks that stand behind each other are drawn in one go.
            const double least = top_ + temperature_ * (best.score - 45.1);
            auto wanted = [&](int64_t b) {
                const F m = maxima()[b];
                return static_cast<double>(m) >= least && (least_of(m) | 0xFFFFFFFFu) >= cut_ && m > -INFINITY;
            };
            if (!wanted(begin)) {
                ++begin;
                continue;
            }
            int64_t end = begin + 1;
            while (end < block_count() && end - begin < kDrawn && wanted(end)) ++end;
            draw_blocks(begin, end, best);
            begin = end;
        }
        hold(best.index / kBlock);
        return key(x_[best.index], best.index);
    }

    bool try_one(uint32_t at, uint32_t high, Best& best) const {
        const F x = value_at(at);
        if (!(x > -INFINITY) || !in_range(key(x, at))) return false;
        const double z = z_of(x);
        if (z + gumbel_bound(high) + 1e-6 < best.score) return false;
        return best.offer(z + gumbel_from_bits(uniform64(at_, id_of(at), high)), at);
    }

    void draw_blocks(int64_t from, int64_t to, Best& best) const {
        if (!ids_) {
            sift(
                from, to, Ahead{}, [&](uint16_t* most) { limits(from, static_cast<F>(top_), best.score, most); },
                [&](uint32_t i, uint32_t high) { return try_one(i, high, best); });
            return;
        }
        for (int64_t i = from * kBlock; i < block_end(to - 1); ++i)
            if (z_of(x_[i]) + 45.1 >= best.score) try_one(i, leading16(at_, id_of(i)), best);
    }

   private:
    Run run_;  // of the draw
};
