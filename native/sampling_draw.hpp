// The draw from what the stages have kept, everything that was asked for beside the token, and the chain as a whole.
// A part of sampling_level.hpp.

template <class F>
class Chain : public Stages<F> {
    using Base = Stages<F>;
    using typename Base::Key;
    using Base::in_, Base::s_, Base::job_, Base::x_, Base::ids_, Base::n_, Base::max_, Base::wide_max_, Base::edited_,
        Base::maxima, Base::buffers, Base::hold, Base::value_at, Base::hold_all, Base::key, Base::index, Base::id_of, Base::least_of,
        Base::block_count, Base::block_end, Base::argmax, Base::list, Base::z_of, Base::whole, Base::for_kept,
        Base::log_total, Base::make_list, Base::first, Base::collect, Base::sort_list, Base::top_, Base::temperature_,
        Base::cut_, Base::have_list_, Base::sorted_, Base::kHead, Base::apply, Base::top_p_whole, Base::surprise_of,
        Base::final_z, Base::at_, Base::mixed_, Base::mu_, Base::greedy_, Base::steered_;

   public:
    using Base::Base;

    int run(int64_t row, Result& out) {
        const Settings& set = job_.settings[job_.one_setting ? 0 : row];
        at_ = Place{job_.keys[job_.one_key ? 0 : row],
                    static_cast<uint32_t>(job_.positions ? job_.positions[row] : job_.one_position),
                    static_cast<uint32_t>(job_.completions ? job_.completions[row] : job_.one_completion),
                    kPurposeToken};
        if (plain(set)) {
            Key drawn;
            const int status = draw_as_read(row, set, drawn);
            if (status == kOk) finish(row, drawn, out);
            return status;
        }
        const int status = this->open(row, set);
        if (status != kOk) return status;
        top_ = wide_max_;
        const uint8_t* stage = set.stages;
        for (; *stage != kEnd; ++stage) {
            if (*stage == kTopP && whole() && !(set.rules & kJoint) && lazy(stage)) break;
            apply(*stage, set, row);
        }
        const bool ended = *stage == kEnd;
        const Key drawn = !ended ? draw_top_p(set.top_p) : greedy_ ? list()[0] : have_list_ ? draw_list() : draw_all();
        if (steered_) job_.state[row] = mu_ - set.mirostat_eta * (surprise_of(drawn) - set.mirostat_tau);
        finish(row, drawn, out);
        return kOk;
    }

   private:
    using V = Vector16;
    static_assert(kDrawn == 16, "one vector of blocks");
    static constexpr int64_t kTried = 64;   // tokens of a list whose noise is looked at in one go
    static constexpr int64_t kLazy = 1024;  // tokens; below, the exact way is as fast

    static bool mild(double temperature) { return temperature > 1e-4 && temperature < 1e4; }

    // Whether the draw is from everything, as it comes.
    bool plain(const Settings& set) const {
        return set.stages[0] == kTemperature && set.stages[1] == kEnd && mild(set.temperature) &&
               in_.vocabulary >= kLazy && !Edits<F>::wanted(job_, set);
    }

    // Whether the prefix need not be known: nothing follows that reads it.
    bool lazy(const uint8_t* stage) const {
        constexpr int kReads = kNeedLogprob | kNeedKept | kNeedMass | kNeedEntropy;
        return sizeof(F) == 4 && stage[1] == kEnd && (job_.need & kReads) == 0 && mild(temperature_) && n_ >= kLazy;
    }

    // Draws under top-p without its cut: the token drawn from everything is the one of the kept ones if it is kept, which
    // is seen from the mass that stands before it. If it is not, the cut lies above it, and what is above is drawn again.
    // Masses are summed roughly, with a bound; what this cannot decide goes the exact way.
    Key draw_top_p(double p) {
        if (head_top_p(p)) return draw_list();
        for (int tries = 0; p > 0.1 && tries < 8; ++tries) {
            const Key drawn = draw_all();
            if (drawn == first()) return drawn;
            const Stands stands = stands_under(p, drawn);
            if (stands == Stands::within) return drawn;
            if (stands == Stands::unknown) break;
            cut_ = drawn + 1;
        }
        cut_ = 0;
        top_p_whole(p);
        return have_list_ ? draw_list() : draw_all();
    }

    // Keeps the prefix, if the few tokens that have a mass to speak of hold it and say where it ends.
    bool head_top_p(double p) {
        constexpr int64_t kFew = 64;  // blocks
        const double small = (1.0 - p) / (8.0 * static_cast<double>(n_));
        const F bound = static_cast<F>(top_ + temperature_ * std::log(small) - 1e-6 * std::fabs(top_));
        int64_t blocks = 0;
        for (int64_t b = 0; b < block_count(); ++b) blocks += maxima()[b] >= bound;
        if (!(small > 0) || blocks > kFew) return false;
        collect(bound, list());
        have_list_ = true;
        sorted_ = false;
        sort_list();
        auto& keys = list();
        int64_t all = 0, sum = 0;
        for (const Key k : keys) all += noise_weight(z_of(k));
        const double least = p * static_cast<double>(all);
        const double most = p * (static_cast<double>(all) + 0x1p42 * small * static_cast<double>(n_)) + 1.0;
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

    // Whether a token is within the prefix that top-p keeps.
    enum class Stands { within, beyond, unknown };

    Stands stands_under(double p, Key drawn) const {
        const float value = static_cast<float>(x_[index(drawn)]), under = std::nextafter(value, -INFINITY);
        // At least what stands before it: everything above it, and its equals but itself.
        const Rough most = linear_sums(under);
        const double self = exp_linear_of(value - static_cast<float>(max_), linear_slope());
        const double before = most.above - self, rest = most.all - before, error = kRough * most.all;
        if (before * (1.0 - p) + error < p * (rest / kLinear)) return Stands::within;
        const Rough least = linear_sums(value);  // surely before it
        if (least.above / kLinear * (1.0 - p) > p * (least.all - least.above) + error) return Stands::beyond;
        // Nearer.
        const Rough near_most = exp_sums(under), near_least = exp_sums(value);
        const double near_error = kRough * near_most.all;
        const double near_before = near_most.above - noise_exp(z_of(drawn));
        if (near_before + near_error < p * (near_most.all - near_error)) return Stands::within;
        if (near_least.above - near_error > p * (near_least.all + near_error)) return Stands::beyond;
        return Stands::unknown;
    }

    float linear_slope() const { return static_cast<float>(1.0 / temperature_) * kLinearSlope; }

    // Sums of exp(z), at most kLinear times too large.
    Rough linear_sums(float bound) const {
        const V::F top = V::all(static_cast<float>(max_)), slope = V::all(linear_slope());
        return sums(bound, [&](V::F x) { return V::exp_linear(V::sub(x, top), slope); });
    }

    // Sums of exp(z), within kRough of the masses.
    Rough exp_sums(float bound) const {
        const V::F top = V::all(static_cast<float>(max_)), inverse = V::all(static_cast<float>(1.0 / temperature_));
        return sums(bound, [&](V::F x) { return V::exp(V::mul(V::sub(x, top), inverse)); });
    }

    template <class Share>
    Rough sums(float bound, Share share) const {
        static_assert(kBlock % 16 == 0, "whole vectors");
        Rough out;
        F near[kBlock];
        for (int64_t b = 0; b < block_count(); ++b) {
            const int64_t count = block_end(b) - b * kBlock;
            const F* x = this->peek(b, near);
            if (count < kBlock) {
                if (x != near) std::copy_n(x, count, near);
                std::fill(near + count, near + kBlock, static_cast<F>(-INFINITY));
                x = near;
            }
            add_rough(reinterpret_cast<const float*>(x), kBlock, bound, share, out);
        }
        return out;
    }

    // ---- the draw ----

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
    // nor does a temperature that may bring back a difference which float32 cannot hold.
    void limits(int64_t from, F top, double score, uint16_t* out) const {
        if (temperature_ >= 1e30) {
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
        fill_lanes(run_, begin >> 3, (end - begin + 7) / 8, lanes, ahead);
        uint16_t most[kDrawn];
        renew(most);
        for (uint32_t j = begin; j < end; j += 64) {
            uint64_t mask = low_lanes(lanes + (j - begin), most[(j - begin) / kBlock]);
            if (mask == 0) continue;
            if (end - j < 64) mask &= (uint64_t{1} << (end - j)) - 1;
            bool better = false;
            for (; mask != 0; mask &= mask - 1) {
                const uint32_t i = j + static_cast<uint32_t>(__builtin_ctzll(mask));
                better |= fn(i, uint32_t{lanes[i - begin]});
            }
            if (better) renew(most);
        }
    }

    // Draws from everything while the row is read, because the one waits for memory and the other does not. What can be
    // said before the greatest value is known: a token whose noise, by its leading bits, cannot bring it to what another
    // one surely has is not drawn. The few that remain are compared when the row has been read.
    int draw_as_read(int64_t row, const Settings& set, Key& drawn) {
        this->begin(row, set);
        temperature_ = set.temperature;
        run_.set_key(at_.key);
        run_.set_row(at_.position, at_.completion, at_.purpose);
        auto& found = s_.candidates;
        found.clear();
        F top = -INFINITY, base = 0;  // the greatest so far; the first finite one, to which scores are relative
        double least = -INFINITY;     // the score that a token surely has
        bool bad = false;
        auto z_to_base = [&](uint32_t i) {
            return (static_cast<double>(this->value_at(i)) - static_cast<double>(base)) / temperature_;
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
                if (!(top > -INFINITY)) base = here;
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
        const uint32_t first = argmax();  // a good score early lets most others go unread
        if (key(x_[first], first) >= cut_) best.offer(0.0 + gumbel(at_, id_of(first)), first);
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
        if (!(x > -INFINITY) || key(x, at) < cut_) return false;
        const double z = z_of(x);
        if (z + gumbel_bound(high) + 1e-6 < best.score) return false;
        return best.offer(z + gumbel_from_bits(uniform64(at_, id_of(at), high)), at);
    }

    void draw_blocks(int64_t from, int64_t to, Best& best) const {
        if (!ids_) {
            sift(
                from, to, Ahead{}, [&](uint16_t* most) { limits(from, max_, best.score, most); },
                [&](uint32_t i, uint32_t high) { return try_one(i, high, best); });
            return;
        }
        for (int64_t i = from * kBlock; i < block_end(to - 1); ++i)
            if (z_of(x_[i]) + 45.1 >= best.score) try_one(i, leading16(at_, id_of(i)), best);
    }

    // ---- everything that was asked for beside the token ----

    void finish(int64_t row, Key drawn, Result& out) {
        const uint32_t at = index(drawn);
        out.token = id_of(at);
        const int need = job_.need;
        if (need == 0) return;
        if (need & kNeedRank) out.rank = rank_of(drawn);
        if (need & kNeedKept) {
            make_list();
            sort_list();
            for (const Key k : list()) out.kept.push_back(id_of(index(k)));
        }
        if (need & (kNeedLogprob | kNeedEntropy)) final_odds(drawn, out);
        if (need & (kNeedTemperature | kNeedMass | kNeedTemperatureEntropy)) warm_odds(drawn, out);
        if (need & kNeedRaw) raw(row, out);
    }

    int64_t rank_of(Key drawn) const {
        int64_t count = 0;
        for (int64_t b = 0; b < block_count(); ++b) {
            if ((least_of(maxima()[b]) | 0xFFFFFFFFu) < drawn) continue;
            hold(b);
            for (int64_t i = b * kBlock; i < block_end(b); ++i) count += key(x_[i], static_cast<uint32_t>(i)) > drawn;
        }
        return count;
    }

    void final_odds(Key drawn, Result& out) const {
        Sums sums;
        if (mixed_ != ~Key{0}) {
            for (const Key k : list()) sums.add(final_z(k));
        } else {
            for_kept([&](const F* x, int64_t count) { sum_exps<F>(x, count, top_, temperature_, sums); });
        }
        out.logprob = final_z(drawn) - std::log(sums.mass);
        out.entropy = std::log(sums.mass) - sums.moment / sums.mass;
    }

    void warm_odds(Key drawn, Result& out) const {
        if (greedy_) {
            out.temperature = out.temperature_entropy = 0.0;
            out.mass = 1.0;
            return;
        }
        hold_all();
        Sums all, kept;
        sum_exps<F>(x_, n_, wide_max_, temperature_, all);
        if (job_.need & kNeedMass)
            for_kept([&](const F* x, int64_t count) { sum_exps<F>(x, count, wide_max_, temperature_, kept); });
        const double z = (static_cast<double>(x_[index(drawn)]) - wide_max_) / temperature_;
        out.temperature = z - std::log(all.mass);
        out.mass = kept.mass / all.mass;
        out.temperature_entropy = std::log(all.mass) - all.moment / all.mass;
    }

    void raw(int64_t row, Result& out) const {
        const F* x = x_;
        double top = wide_max_;
        if (edited_) {
            auto& values = buffers().raw;
            values.resize(in_.vocabulary);
            widen<F>(in_, in_.data + row * in_.row_bytes, 0, in_.vocabulary, values.data());
            x = values.data();
            top = static_cast<double>(*std::max_element(values.begin(), values.end()));
        } else {
            hold_all();
        }
        Sums all;
        sum_exps<F>(x, in_.vocabulary, top, 1.0, all);
        out.raw = static_cast<double>(x[out.token]) - top - std::log(all.mass);
    }

    Run run_;  // of the draw
};

int run_row(const Logits& in, const Job& job, Scratch& scratch, int64_t row, Result& out) {
    if (in.type == kFloat64) return Chain<double>(in, job, scratch).run(row, out);
    return Chain<float>(in, job, scratch).run(row, out);
}
