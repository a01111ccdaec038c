// The chain on one row: reading, stages, draw, and everything that was asked for beside the token. A part of
// sampling_level.hpp.

template <class F>
class Chain : public Draw<F> {
    using Base = Draw<F>;
    using typename Base::Key;
    using V = Vector16;
    using Base::in_, Base::job_, Base::x_, Base::n_, Base::max_, Base::wide_max_, Base::edited_, Base::maxima,
        Base::buffers, Base::hold, Base::hold_all, Base::peek, Base::key, Base::index, Base::id_of, Base::least_of,
        Base::block_count, Base::block_end, Base::list, Base::z_of, Base::whole, Base::for_kept, Base::make_list,
        Base::first, Base::sort_list, Base::top_, Base::temperature_, Base::cut_, Base::have_list_, Base::apply,
        Base::head_top_p, Base::top_p_of_row, Base::surprise_of, Base::final_z, Base::at_, Base::mixed_, Base::mu_,
        Base::greedy_, Base::steered_, Base::plain, Base::mild, Base::draw_as_read, Base::draw_list, Base::draw_all;

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
    // Whether the prefix need not be known: nothing follows that reads it.
    bool lazy(const uint8_t* stage) const {
        constexpr int kReads = kNeedLogprob | kNeedKept | kNeedMass | kNeedEntropy;
        return sizeof(F) == 4 && stage[1] == kEnd && (job_.need & kReads) == 0 && mild(temperature_);
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
        top_p_of_row(p);
        return have_list_ ? draw_list() : draw_all();
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
            const F* x = peek(b, near);
            if (count < kBlock) {
                if (x != near) std::copy_n(x, count, near);
                std::fill(near + count, near + kBlock, static_cast<F>(-INFINITY));
                x = near;
            }
            add_rough(reinterpret_cast<const float*>(x), kBlock, bound, share, out);
        }
        return out;
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

};

int run_row(const Logits& in, const Job& job, Scratch& scratch, int64_t row, Result& out) {
    if (in.type == kFloat64) return Chain<double>(in, job, scratch).run(row, out);
    return Chain<float>(in, job, scratch).run(row, out);
}
