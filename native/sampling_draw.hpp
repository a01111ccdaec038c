// The draw from what the stages have kept, everything that was asked for beside the token, and the chain as a whole.
// A part of sampling_level.hpp.

template <class F>
class Chain : public Stages<F> {
    using Base = Stages<F>;
    using typename Base::Key;
    using Base::in_, Base::s_, Base::job_, Base::x_, Base::ids_, Base::n_, Base::max_, Base::wide_max_, Base::edited_,
        Base::maxima, Base::buffers, Base::hold, Base::hold_all, Base::key, Base::index, Base::id_of, Base::least_of,
        Base::block_count, Base::block_end, Base::argmax, Base::list, Base::z_of, Base::whole, Base::for_kept,
        Base::log_total, Base::make_list, Base::first, Base::select, Base::sort_list, Base::top_, Base::temperature_,
        Base::cut_, Base::have_list_, Base::sorted_, Base::kHead, Base::apply, Base::top_p_whole, Base::surprise_of,
        Base::final_z, Base::at_, Base::mixed_, Base::mu_, Base::greedy_, Base::steered_;

   public:
    using Base::Base;

    int run(int64_t row, Result& out) {
        const Settings& set = job_.settings[job_.one_setting ? 0 : row];
        const int status = this->open(row, set);
        if (status != kOk) return status;
        at_ = Place{job_.keys[job_.one_key ? 0 : row],
                    static_cast<uint32_t>(job_.positions ? job_.positions[row] : job_.one_position),
                    static_cast<uint32_t>(job_.completions ? job_.completions[row] : job_.one_completion),
                    kPurposeToken};
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
    static constexpr int64_t kLazy = 1024;  // tokens; below, the exact way is as fast

    // Whether the prefix need not be known: nothing follows that reads it.
    bool lazy(const uint8_t* stage) const {
        constexpr int kReads = kNeedLogprob | kNeedKept | kNeedMass | kNeedEntropy;
        return sizeof(F) == 4 && stage[1] == kEnd && (job_.need & kReads) == 0 && temperature_ > 1e-4 &&
               temperature_ < 1e4 && n_ >= kLazy;
    }

    // Draws under top-p without its cut: the token drawn from everything is the one of the kept ones if it is kept, which
    // is seen from the mass that stands before it. If it is not, the cut lies above it, and what is above is drawn again.
    // Masses are summed in float32 with a bound; what this cannot decide goes the exact way.
    Key draw_top_p(double p) {
        const float inverse = static_cast<float>(1.0 / temperature_), top = static_cast<float>(max_);
        const float* const x = reinterpret_cast<const float*>(x_);
        hold_all();
        if (peaked(top, inverse) && head_top_p(p, rough_sums(x, n_, top, inverse, INFINITY).all)) return draw_list();
        for (int tries = 0; p > 0.1 && tries < 8; ++tries) {
            const Key drawn = draw_all();
            const float value = static_cast<float>(x_[index(drawn)]);
            // At least what stands before the token: everything above it, and its equals but itself.
            const Rough most = rough_sums(x, n_, top, inverse, std::nextafter(value, -INFINITY));
            const double error = kRough * most.all;
            if (most.above - noise_exp(z_of(static_cast<F>(value))) + error < p * (most.all - error)) return drawn;
            if (drawn == first()) return drawn;
            const Rough least = rough_sums(x, n_, top, inverse, value);
            if (least.above - error <= p * (least.all + error)) break;
            cut_ = drawn + 1;
        }
        cut_ = 0;
        top_p_whole(p);
        return have_list_ ? draw_list() : draw_all();
    }

    // Whether a few tokens are likely to hold the mass that top-p asks for: few block maxima are near the top.
    bool peaked(float top, float inverse) const {
        const float* const m = reinterpret_cast<const float*>(maxima().data());
        return rough_sums(m, block_count(), top, inverse, INFINITY).all < 6.0;
    }

    // Keep the prefix among the first `kHead` tokens, if the bounds on the sum of all say which one it is.
    bool head_top_p(double p, double all) {
        const double error = kRough * all;
        select(kHead, list());
        have_list_ = true;
        sorted_ = false;
        sort_list();
        auto& keys = list();
        double sum = 0;
        size_t length = 0;
        for (; length < keys.size(); ++length) {
            if (length > 0 && sum >= p * (all - error)) {  // may be enough already
                if (sum < p * (all + error)) break;
                keys.resize(length);
                return true;
            }
            sum += static_cast<double>(noise_weight(z_of(keys[length]))) * 0x1p-42;
        }
        have_list_ = sorted_ = false;
        return false;
    }

    // ---- the draw ----

    // Score, then the lower id, which is the lower index.
    struct Best {
        double score = -INFINITY;
        uint32_t index = 0xFFFFFFFFu;
        void offer(double candidate, uint32_t at) {
            if (candidate > score || (candidate == score && at < index)) {
                score = candidate;
                index = at;
            }
        }
    };

    Key draw_list() const {
        Best best;
        for (const Key k : list()) {
            const uint32_t i = index(k), id = id_of(i);
            const double z = final_z(k);
            if (z + 45.1 < best.score) continue;
            const uint32_t high = leading16(at_, id);
            if (z + gumbel_bound(high) + 1e-6 < best.score) continue;
            best.offer(z + gumbel_from_bits(uniform64(at_, id, high)), i);
        }
        return key(x_[best.index], best.index);
    }

    Key draw_all() {
        run_.set_key(at_.key);
        run_.set_row(at_.position, at_.completion, at_.purpose);
        Best best;
        const uint32_t first = argmax();  // a good score early lets most others go unread
        if (key(x_[first], first) >= cut_) best.offer(0.0 + gumbel(at_, id_of(first)), first);
        const F* m = maxima().data();
        int64_t begin = 0;
        while (begin < block_count()) {
            // Blocks that stand behind each other are drawn in one go.
            auto wanted = [&](int64_t b) {
                return z_of(m[b]) + 45.1 >= best.score && (least_of(m[b]) | 0xFFFFFFFFu) >= cut_;
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
        return key(x_[best.index], best.index);
    }

    void try_one(const Place& at, uint32_t index, uint32_t high, Best& best) const {
        if (!(x_[index] > -INFINITY) || key(x_[index], index) < cut_) return;
        const double z = z_of(x_[index]);
        if (z + gumbel_bound(high) + 1e-6 < best.score) return;
        best.offer(z + gumbel_from_bits(uniform64(at, id_of(index), high)), index);
    }

    void draw_blocks(int64_t from, int64_t to, Best& best) const {
        const uint32_t begin = static_cast<uint32_t>(from * kBlock), end = static_cast<uint32_t>(block_end(to - 1));
        for (int64_t b = from; b < to; ++b) hold(b);
        if (ids_) {
            for (uint32_t i = begin; i < end; ++i) {
                const double z = z_of(x_[i]);
                if (z + 45.1 < best.score) continue;
                try_one(at_, i, leading16(at_, id_of(i)), best);
            }
            return;
        }
        alignas(64) uint16_t lanes[kDrawn * kBlock];
        fill_lanes(run_, begin >> 3, (end - begin + 7) / 8, lanes);
        uint32_t i = begin;
        // z + bound > score in float32 for many tokens at once. The margin covers its rounding; a NaN (0 * inf at a tiny
        // temperature) passes on to the exact test. A difference of logits that overflows is decided by it only while the
        // temperature cannot bring it back.
#if defined(TWODICE_LEVEL_AVX512)
        if (sizeof(F) == 4 && temperature_ < 1e30) {
            const __m512 scale = _mm512_set1_ps(static_cast<float>(1.0 / temperature_));
            const __m512 top = _mm512_set1_ps(static_cast<float>(max_));
            const __m512 slope = _mm512_set1_ps(-0x1p-23f * 0.6931472f), offset = _mm512_set1_ps(143.0f * 0.6931472f);
            __m512 least = _mm512_set1_ps(static_cast<float>(best.score) - 2e-3f);
            for (; i + 16 <= end; i += 16) {
                const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes + (i - begin)));
                const __m512 h = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(high));
                const __m512 bits = _mm512_cvtepi32_ps(_mm512_castps_si512(h));
                const __m512 bound = _mm512_add_ps(_mm512_mul_ps(bits, slope), offset);
                const __m512 x = _mm512_loadu_ps(reinterpret_cast<const float*>(x_ + i));
                const __m512 z = _mm512_mul_ps(_mm512_sub_ps(x, top), scale);
                unsigned mask = _mm512_cmp_ps_mask(_mm512_add_ps(z, bound), least, _CMP_NLE_UQ);
                if (mask == 0) continue;
                for (; mask != 0; mask &= mask - 1) {
                    const uint32_t j = i + static_cast<uint32_t>(__builtin_ctz(mask));
                    try_one(at_, j, lanes[j - begin], best);
                }
                least = _mm512_set1_ps(static_cast<float>(best.score) - 2e-3f);
            }
        }
#elif defined(TWODICE_LEVEL_AVX2)
        if (sizeof(F) == 4 && temperature_ < 1e30) {
            const __m256 scale = _mm256_set1_ps(static_cast<float>(1.0 / temperature_));
            const __m256 top = _mm256_set1_ps(static_cast<float>(max_));
            const __m256 slope = _mm256_set1_ps(-0x1p-23f * 0.6931472f), offset = _mm256_set1_ps(143.0f * 0.6931472f);
            __m256 least = _mm256_set1_ps(static_cast<float>(best.score) - 2e-3f);
            for (; i + 8 <= end; i += 8) {
                const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes + (i - begin)));
                const __m256 h = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(high));
                const __m256 bits = _mm256_cvtepi32_ps(_mm256_castps_si256(h));
                const __m256 bound = _mm256_add_ps(_mm256_mul_ps(bits, slope), offset);
                const __m256 x = _mm256_loadu_ps(reinterpret_cast<const float*>(x_ + i));
                const __m256 z = _mm256_mul_ps(_mm256_sub_ps(x, top), scale);
                const __m256 out = _mm256_cmp_ps(_mm256_add_ps(z, bound), least, _CMP_LE_OQ);
                unsigned mask = ~static_cast<unsigned>(_mm256_movemask_ps(out)) & 0xFFu;
                if (mask == 0) continue;
                for (; mask != 0; mask &= mask - 1) {
                    const uint32_t j = i + static_cast<uint32_t>(__builtin_ctz(mask));
                    try_one(at_, j, lanes[j - begin], best);
                }
                least = _mm256_set1_ps(static_cast<float>(best.score) - 2e-3f);
            }
        }
#endif
        for (; i < end; ++i) try_one(at_, i, lanes[i - begin], best);
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
