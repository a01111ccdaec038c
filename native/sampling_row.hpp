// The chain on one row. Included once for each instruction set, inside a namespace of its own (see sampling.cpp).
// No include guard on purpose, and no system header: those belong outside the target region.
//
// All filters of the chain keep a prefix of the rank order (value, then the lower id). So what is kept is one number:
// the key of the last token kept. A key packs (value, ~index) so that a larger key stands earlier in the order.

template <class F>
struct Order;

template <>
struct Order<float> {
    using Key = uint64_t;
    static inline Key key(float x, uint32_t i) {
        const uint32_t b = bits_of<uint32_t>(x + 0.0f);  // -0 becomes +0: they are equal
        const uint32_t ordered = b ^ (static_cast<uint32_t>(static_cast<int32_t>(b) >> 31) | 0x80000000u);
        return (uint64_t{ordered} << 32) | (0xFFFFFFFFu - i);
    }
    static inline uint32_t index(Key k) { return 0xFFFFFFFFu - static_cast<uint32_t>(k); }
};

template <>
struct Order<double> {
    using Key = unsigned __int128;
    static inline Key key(double x, uint32_t i) {
        const uint64_t b = bits_of<uint64_t>(x + 0.0);
        const uint64_t ordered = b ^ (static_cast<uint64_t>(static_cast<int64_t>(b) >> 63) | 0x8000000000000000u);
        return (static_cast<Key>(ordered) << 32) | (0xFFFFFFFFu - i);
    }
    static inline uint32_t index(Key k) { return 0xFFFFFFFFu - static_cast<uint32_t>(k); }
};

// Largest value of `count` numbers; `bad` becomes true where one is NaN.
template <class F>
inline F block_max(const F* x, int64_t count, bool& bad) {
    F best = -INFINITY;
    int nan = 0;
    for (int64_t j = 0; j < count; ++j) {
        nan |= x[j] != x[j];
        best = x[j] > best ? x[j] : best;
    }
    bad |= nan != 0;
    return best;
}

#ifdef TWODICE_LEVEL_AVX2
template <>
inline float block_max<float>(const float* x, int64_t count, bool& bad) {
    if (count != kBlock) {
        float best = -INFINITY;
        for (int64_t j = 0; j < count; ++j) {
            bad |= x[j] != x[j];
            best = x[j] > best ? x[j] : best;
        }
        return best;
    }
    __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8);
    __m256 nan = _mm256_cmp_ps(a, b, _CMP_UNORD_Q);
    for (int64_t j = 16; j < kBlock; j += 16) {
        const __m256 c = _mm256_loadu_ps(x + j), d = _mm256_loadu_ps(x + j + 8);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(c, d, _CMP_UNORD_Q));
        a = _mm256_max_ps(a, c);
        b = _mm256_max_ps(b, d);
    }
    a = _mm256_max_ps(a, b);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    s = _mm_max_ss(s, _mm_movehdup_ps(s));
    bad |= _mm256_movemask_ps(nan) != 0;
    return _mm_cvtss_f32(s);
}
#endif

#ifdef TWODICE_LEVEL_AVX2
// noise_exp of four numbers, the same operations.
inline __m256d exp4(__m256d z) {
    const __m256d low = _mm256_max_pd(z, _mm256_set1_pd(-700.0)), round = _mm256_set1_pd(kRound);
    const __m256d shifted = _mm256_add_pd(_mm256_mul_pd(low, _mm256_set1_pd(kLog2E)), round);
    const __m256d n = _mm256_sub_pd(shifted, round);
    const __m256d r = _mm256_sub_pd(_mm256_sub_pd(low, _mm256_mul_pd(n, _mm256_set1_pd(kLn2High))),
                                    _mm256_mul_pd(n, _mm256_set1_pd(kLn2Low)));
    constexpr double c[11] = {1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
                              1.0 / 24.0,      1.0 / 6.0,      0.5,           1.0,          1.0};
    __m256d y = _mm256_set1_pd(1.0 / 39916800.0);
    for (const double term : c) y = _mm256_add_pd(_mm256_mul_pd(y, r), _mm256_set1_pd(term));
    const __m256i scale = _mm256_add_epi64(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52),
                                           _mm256_set1_epi64x(kOneBits));
    return _mm256_mul_pd(y, _mm256_castsi256_pd(scale));
}

inline __m256d load4(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
inline __m256d load4(const double* x) { return _mm256_loadu_pd(x); }
#endif

// z, mass and bucket of `count` logits.
template <class F>
inline void masses(const F* x, int64_t count, double m, double t, double per_unit, int64_t* weight, int32_t* bucket) {
    int64_t j = 0;
#ifdef TWODICE_LEVEL_AVX2
    const __m256d top = _mm256_set1_pd(m), warm = _mm256_set1_pd(t), round = _mm256_set1_pd(kRound);
    const __m256d last = _mm256_set1_pd(static_cast<double>(kBuckets - 1)), per = _mm256_set1_pd(per_unit);
    for (; j + 4 <= count; j += 4) {
        __m256d z = _mm256_sub_pd(load4(x + j), top);
        if (t != 1.0) z = _mm256_div_pd(z, warm);
        const __m256d scaled = _mm256_add_pd(_mm256_mul_pd(exp4(z), _mm256_set1_pd(0x1p42)), round);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight + j),
                            _mm256_sub_epi64(_mm256_castpd_si256(scaled), _mm256_set1_epi64x(kRoundBits)));
        const __m256d at = _mm256_mul_pd(_mm256_sub_pd(_mm256_setzero_pd(), z), per);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bucket + j), _mm256_cvttpd_epi32(_mm256_min_pd(at, last)));
    }
#endif
    for (; j < count; ++j) {
        const double z = (static_cast<double>(x[j]) - m) / t, at = (0.0 - z) * per_unit;
        weight[j] = noise_weight(z);
        bucket[j] = static_cast<int32_t>(at < kBuckets - 1 ? at : kBuckets - 1);
    }
}

// Sum of exp((x - m) / t), in float64 and in no promised order.
template <class F>
inline double sum_exp(const F* x, int64_t count, double m, double t) {
    double sum = 0;
    int64_t j = 0;
#ifdef TWODICE_LEVEL_AVX2
    const __m256d top = _mm256_set1_pd(m), warm = _mm256_set1_pd(t);
    __m256d a = _mm256_setzero_pd();
    for (; j + 4 <= count; j += 4) {
        __m256d z = _mm256_sub_pd(load4(x + j), top);
        if (t != 1.0) z = _mm256_div_pd(z, warm);
        a = _mm256_add_pd(a, exp4(z));
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, a);
    sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
#endif
    for (; j < count; ++j) sum += noise_exp((static_cast<double>(x[j]) - m) / t);
    return sum;
}

inline float widen_half(uint16_t h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3FFu;
    if (exponent == 31) return bits_of<float>(sign | 0x7F800000u | (fraction << 13));
    if (exponent != 0) return bits_of<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
}

// Row of any type and stride to contiguous F.
template <class F>
inline void widen(const Logits& in, const char* row, F* out) {
    const int64_t n = in.vocabulary, step = in.column_stride;
    switch (in.type) {
        case kFloat32: {
            const float* p = reinterpret_cast<const float*>(row);
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<F>(p[i * step]);
            break;
        }
        case kBfloat16: {
            const uint16_t* p = reinterpret_cast<const uint16_t*>(row);
            if (step == 1)
                for (int64_t i = 0; i < n; ++i) out[i] = bits_of<float>(uint32_t{p[i]} << 16);
            else
                for (int64_t i = 0; i < n; ++i) out[i] = bits_of<float>(uint32_t{p[i * step]} << 16);
            break;
        }
        case kFloat16: {
            const uint16_t* p = reinterpret_cast<const uint16_t*>(row);
            int64_t i = 0;
#ifdef TWODICE_LEVEL_AVX2
            if (step == 1 && sizeof(F) == 4)
                for (; i + 8 <= n; i += 8)
                    _mm256_storeu_ps(reinterpret_cast<float*>(out + i),
                                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
            for (; i < n; ++i) out[i] = widen_half(p[i * step]);
            break;
        }
        case kFloat64: {
            const double* p = reinterpret_cast<const double*>(row);
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<F>(p[i * step]);
            break;
        }
    }
}

template <class F>
class Chain {
    using O = Order<F>;
    using Key = typename O::Key;

  public:
    Chain(const Logits& in, const Job& job, Scratch& scratch) : in_(in), job_(job), s_(scratch) {}

    int run(int64_t row, Result& out) {
        const Settings& set = job_.settings[job_.one_setting ? 0 : row];
        const int status = prepare(row, set);
        if (status != kOk) return status;
        temperature_ = set.temperature;
        log_min_p_ = -INFINITY;
        have_list_ = sorted_ = false;
        cut_ = O::key(-std::numeric_limits<F>::max(), 0xFFFFFFFFu);
        if (temperature_ == 0.0) {  // stage 4 leaves the first argmax, and there is nothing to draw
            temperature_ = 1.0;
            list().assign(1, O::key(max_, argmax()));
            have_list_ = sorted_ = true;
            cut_ = list()[0];
            finish(row, list()[0], true, out);
            return kOk;
        }
        if (set.top_k > 0 && set.top_k < n_) top_k(set.top_k);
        if (set.top_p < 1.0) top_p(set.top_p);
        min_p(set.log_min_p);
        const Place at{job_.keys[job_.one_key ? 0 : row], 
                       static_cast<uint32_t>(job_.positions ? job_.positions[row] : job_.one_position),
                       static_cast<uint32_t>(job_.completions ? job_.completions[row] : job_.one_completion), 0};
        finish(row, have_list_ ? draw_list(at) : draw_all(at), false, out);
        return kOk;
    }

  private:
    std::vector<Key>& list() { return s_.template keys<Key>(); }
    double z_of(F x) const { return (static_cast<double>(x) - wide_max_) / temperature_; }
    double z_of(Key k) const { return z_of(x_[O::index(k)]); }
    uint32_t id_of(uint32_t index) const { return ids_ ? static_cast<uint32_t>(ids_[index]) : index; }
    int64_t block_count() const { return (n_ + kBlock - 1) / kBlock; }
    int64_t block_end(int64_t b) const { return b * kBlock + kBlock < n_ ? b * kBlock + kBlock : n_; }

    uint32_t argmax() const {
        const F* maxima = s_.template maxima<F>().data();
        int64_t b = 0;
        while (!(maxima[b] == max_)) ++b;
        int64_t i = b * kBlock;
        while (!(x_[i] == max_)) ++i;
        return static_cast<uint32_t>(i);
    }

    bool take_maxima() {
        auto& maxima = s_.template maxima<F>();
        maxima.resize(block_count());
        bool bad = false;
        F best = -INFINITY;
        for (int64_t b = 0; b < block_count(); ++b) {
            const F m = block_max<F>(x_ + b * kBlock, block_end(b) - b * kBlock, bad);
            maxima[b] = m;
            best = m > best ? m : best;
        }
        max_ = best;
        wide_max_ = static_cast<double>(best);
        return bad;
    }

    // Stages 1 to 3.
    int prepare(int64_t row, const Settings& set) {
        const char* start = in_.data + row * in_.row_bytes;
        const bool penalised = set.penalty != 1.0f && job_.history_offsets != nullptr;
        const bool edited = set.bias_begin < set.bias_end || penalised || set.has_allowed;
        const bool direct = in_.column_stride == 1 && in_.type == (sizeof(F) == 4 ? kFloat32 : kFloat64);
        n_ = in_.vocabulary;
        ids_ = nullptr;
        auto& values = s_.template values<F>();
        if (direct && !edited) {
            x_ = reinterpret_cast<const F*>(start);
        } else {
            values.resize(n_);
            widen<F>(in_, start, values.data());
            x_ = values.data();
        }
        if (take_maxima()) return kNan;
        if (max_ == INFINITY) return kInfinite;
        if (edited) {
            for (int64_t j = set.bias_begin; j < set.bias_end; ++j) values[job_.bias_ids[j]] += job_.bias_values[j];
            if (penalised) penalise(row, set, values);
            if (set.has_allowed) {
                const int64_t count = set.allowed_end - set.allowed_begin;
                ids_ = job_.allowed_ids + set.allowed_begin;  // ascending, so the order of places is the order of ids
                for (int64_t j = 0; j < count; ++j) values[j] = values[ids_[j]];
                n_ = count;
            }
            take_maxima();
            if (max_ == INFINITY) return kInfinite;
        }
        return max_ == -INFINITY ? kEmpty : kOk;
    }

    void penalise(int64_t row, const Settings& set, std::vector<F>& values) {
        const F penalty = static_cast<F>(set.penalty);
        auto& seen = s_.seen;
        seen.resize((in_.vocabulary + 63) / 64, 0);
        const int64_t begin = job_.history_offsets[row], end = job_.history_offsets[row + 1];
        for (int64_t j = begin; j < end; ++j) {
            const int64_t id = job_.history_ids[j];
            const uint64_t bit = uint64_t{1} << (id & 63);
            if (seen[id >> 6] & bit) continue;
            seen[id >> 6] |= bit;
            values[id] = values[id] > 0 ? values[id] / penalty : values[id] * penalty;
        }
        for (int64_t j = begin; j < end; ++j) seen[job_.history_ids[j] >> 6] = 0;
    }

    // Every living key whose value is at least `bound`, in order of index.
    void collect(F bound, std::vector<Key>& out) const {
        out.clear();
        const F* maxima = s_.template maxima<F>().data();
        for (int64_t b = 0; b < block_count(); ++b) {
            if (!(maxima[b] >= bound)) continue;
            collect_block(b, bound, out);
        }
    }

    void collect_block(int64_t b, F bound, std::vector<Key>& out) const {
        const int64_t begin = b * kBlock, end = block_end(b);
        int64_t i = begin;
#ifdef TWODICE_LEVEL_AVX2
        if constexpr (sizeof(F) == 4) {
            const __m256 least = _mm256_set1_ps(bound);
            for (; i + 8 <= end; i += 8) {
                const __m256 v = _mm256_loadu_ps(reinterpret_cast<const float*>(x_ + i));
                unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ)));
                while (mask != 0) {
                    const int64_t at = i + __builtin_ctz(mask);
                    if (x_[at] > -INFINITY) out.push_back(O::key(x_[at], static_cast<uint32_t>(at)));
                    mask &= mask - 1;
                }
            }
        }
#endif
        for (; i < end; ++i)
            if (x_[i] >= bound && x_[i] > -INFINITY) out.push_back(O::key(x_[i], static_cast<uint32_t>(i)));
    }

    // The `count` first keys of the rank order, unsorted; fewer where fewer live. The count-th largest block maximum is
    // a lower bound of the count-th largest value, so only blocks that reach it are read again.
    void select(int64_t count, std::vector<Key>& out) {
        const auto& maxima = s_.template maxima<F>();
        F bound = -INFINITY;
        if (count <= block_count()) {
            auto& copy = s_.template copy<F>();
            copy = maxima;
            std::nth_element(copy.begin(), copy.begin() + (count - 1), copy.end(), std::greater<F>());
            bound = copy[count - 1];
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

    void top_k(int64_t k) {
        select(k, list());
        have_list_ = true;
        sorted_ = false;
        cut_ = *std::min_element(list().begin(), list().end());
    }

    static int64_t need_of(double p, int64_t total) {
        const double wanted = std::ceil(p * static_cast<double>(total));
        int64_t need = wanted < 1.0 ? 1 : static_cast<int64_t>(wanted);
        return need < total ? need : total;
    }

    // Length of the shortest prefix of the sorted list whose mass reaches `need`, or 0 where the list does not.
    int64_t prefix(int64_t need) {
        int64_t sum = 0;
        const auto& keys = list();
        for (size_t j = 0; j < keys.size(); ++j) {
            sum += noise_weight(z_of(keys[j]));
            if (sum >= need) return static_cast<int64_t>(j) + 1;
        }
        return 0;
    }

    // Masses of the whole row, in kBuckets equal slices of z from 0 down to -30, below which every mass is 0. Four
    // histograms side by side, since neighbours in a flat row would wait for each other's sum. Returns the total.
    int64_t fill_buckets(int64_t* mass) const {
        constexpr int64_t kChunk = 256;
        int64_t weight[kChunk];
        int32_t bucket[kChunk];
        std::vector<int64_t>& part = s_.buckets;
        part.assign(4 * kBuckets, 0);
        const double m = wide_max_, t = temperature_;
        for (int64_t begin = 0; begin < n_; begin += kChunk) {
            const int64_t count = n_ - begin < kChunk ? n_ - begin : kChunk;
            const F* const x = x_ + begin;
            masses<F>(x, count, m, t, kBuckets / 30.0, weight, bucket);
            for (int64_t j = 0; j < count; ++j) part[(j & 3) * kBuckets + bucket[j]] += weight[j];
        }
        int64_t total = 0;
        for (int64_t i = 0; i < kBuckets; ++i) {
            mass[i] = part[i] + part[kBuckets + i] + part[2 * kBuckets + i] + part[3 * kBuckets + i];
            total += mass[i];
        }
        return total;
    }

    // Monotone in z: a later token in the order never has an earlier bucket.
    static inline int32_t bucket_of(double z, double top, double per_unit) {
        const double at = (top - z) * per_unit;
        return static_cast<int32_t>(at < kBuckets - 1 ? at : kBuckets - 1);
    }

    // The bucket in which the running sum reaches `need`; `need` becomes what is still wanted of it.
    static int64_t crossing(const int64_t* mass, int64_t& need) {
        int64_t b = 0;
        for (; mass[b] < need; ++b) need -= mass[b];
        return b;
    }

    // The key of the token that crosses: one histogram of the row, then finer ones of the bucket that holds the cut,
    // until it is small enough to sort. All sums are integers, so this is the answer of the sorted prefix.
    Key cut_of(int64_t* mass, int64_t need) {
        double top = 0.0, per_unit = kBuckets / 30.0;
        int64_t b = crossing(mass, need);
        auto& keys = list();
        keys.clear();
        for (int64_t block = 0; block < block_count(); ++block) {
            if (bucket_of(z_of(s_.template maxima<F>()[block]), top, per_unit) > b) continue;
            for (int64_t i = block * kBlock; i < block_end(block); ++i)
                if (x_[i] > -INFINITY && bucket_of(z_of(x_[i]), top, per_unit) == b)
                    keys.push_back(O::key(x_[i], static_cast<uint32_t>(i)));
        }
        for (int level = 0; level < 3 && keys.size() > 2048; ++level) {
            top -= static_cast<double>(b) / per_unit;
            per_unit *= kBuckets / 2;  // half: the slices overlap the bucket's ends whatever was rounded
            std::fill(mass, mass + kBuckets, 0);
            const double start = top + 0.25 * kBuckets / per_unit;
            for (const Key k : keys) mass[slice(z_of(k), start, per_unit)] += noise_weight(z_of(k));
            b = crossing(mass, need);
            keys.erase(std::remove_if(keys.begin(), keys.end(),
                                      [&](Key k) { return slice(z_of(k), start, per_unit) != b; }),
                       keys.end());
            top = start;
        }
        std::sort(keys.begin(), keys.end(), std::greater<Key>());
        const int64_t length = prefix(need);
        return keys[length - 1];
    }

    static int32_t slice(double z, double top, double per_unit) {
        const int32_t b = bucket_of(z, top, per_unit);
        return b < 0 ? 0 : b;
    }

    void top_p(double p) {
        if (have_list_) {
            sort_list();
            int64_t total = 0;
            for (const Key k : list()) total += noise_weight(z_of(k));
            list().resize(prefix(need_of(p, total)));
            cut_ = list().back();
            return;
        }
        int64_t mass[kBuckets];
        const int64_t need = need_of(p, fill_buckets(mass));
        cut_ = cut_of(mass, need);
        list().clear();
        const F bound = x_[O::index(cut_)];
        int64_t blocks = 0;
        for (const F m : s_.template maxima<F>()) blocks += m >= bound;
        if (blocks > 64) return;  // too many for a list: the draw reads the row again, with the cut
        collect(bound, list());
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k < cut_; }), keys.end());
        have_list_ = true;
        sorted_ = false;
    }

    void min_p(double log_min_p) {
        log_min_p_ = log_min_p;
        if (!have_list_ || log_min_p == -INFINITY) return;
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return !(z_of(k) >= log_min_p); }), keys.end());
    }

    bool keeps(F x, uint32_t i) const { return O::key(x, i) >= cut_ && z_of(x) >= log_min_p_; }

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

    Key draw_list(const Place& at) const {
        const auto& keys = s_.template keys<Key>();
        Best best;
        for (const Key k : keys) {
            const uint32_t index = O::index(k), id = id_of(index);
            const double z = z_of(x_[index]);
            if (z + 45.1 < best.score) continue;
            const uint32_t high = leading16(at, id);
            if (z + gumbel_bound(high) + 1e-6 < best.score) continue;
            best.offer(z + gumbel_from_bits(uniform64(at, id, high)), index);
        }
        return O::key(x_[best.index], best.index);
    }

    Key draw_all(const Place& at) {
        run_.set_key(at.key);
        run_.set_row(at.position, at.completion, at.purpose);
        Best best;
        const F* maxima = s_.template maxima<F>().data();
        const uint32_t first = argmax();  // a good score early lets most others go unread
        best.offer(0.0 + gumbel(at, id_of(first)), first);
        for (int64_t b = 0; b < block_count(); ++b) {
            const double z_top = z_of(maxima[b]);
            if (z_top + 45.1 < best.score || !(z_top >= log_min_p_)) continue;
            if (O::key(maxima[b], 0) < cut_) continue;
            draw_block(at, b, best);
        }
        return O::key(x_[best.index], best.index);
    }

    void try_one(const Place& at, uint32_t index, uint32_t high, Best& best) const {
        if (!keeps(x_[index], index)) return;
        const double z = z_of(x_[index]);
        if (z + gumbel_bound(high) + 1e-6 < best.score) return;
        best.offer(z + gumbel_from_bits(uniform64(at, id_of(index), high)), index);
    }

    void draw_block(const Place& at, int64_t b, Best& best) const {
        const uint32_t begin = static_cast<uint32_t>(b * kBlock), end = static_cast<uint32_t>(block_end(b));
        if (ids_) {
            for (uint32_t i = begin; i < end; ++i) {
                const double z = z_of(x_[i]);
                if (z + 45.1 < best.score) continue;
                try_one(at, i, leading16(at, id_of(i)), best);
            }
            return;
        }
        alignas(32) uint16_t lanes[kBlock];
        fill_lanes(run_, begin >> 3, (end - begin + 7) / 8, lanes);
        uint32_t i = begin;
#ifdef TWODICE_LEVEL_AVX2
        // z + bound > score in float32 for 8 tokens at once. The margin covers its rounding; a NaN (0 * inf at a tiny
        // temperature) passes on to the exact test. A difference of logits that overflows is decided by it only while the
        // temperature cannot bring it back.
        const float inverse = static_cast<float>(1.0 / temperature_);
        const __m256 scale = _mm256_set1_ps(inverse), top = _mm256_set1_ps(static_cast<float>(max_));
        const __m256 slope = _mm256_set1_ps(-0x1p-23f * 0.6931472f), offset = _mm256_set1_ps(143.0f * 0.6931472f);
        if (sizeof(F) == 4 && temperature_ < 1e30) {
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
                    try_one(at, j, lanes[j - begin], best);
                }
                least = _mm256_set1_ps(static_cast<float>(best.score) - 2e-3f);
            }
        }
#endif
        for (; i < end; ++i) try_one(at, i, lanes[i - begin], best);
    }

    // Everything that was asked for beside the token.
    void finish(int64_t row, Key drawn, bool greedy, Result& out) {
        const uint32_t index = O::index(drawn);
        out.token = id_of(index);
        const int need = job_.need;
        if (need == 0) return;
        if (need & kNeedRank) out.rank = rank_of(drawn);
        if (need & kNeedKept) {
            if (!have_list_) {
                collect(-INFINITY, list());
                auto& keys = list();
                keys.erase(std::remove_if(keys.begin(), keys.end(),
                                          [&](Key k) { return !(k >= cut_ && z_of(k) >= log_min_p_); }),
                           keys.end());
                have_list_ = true;
                sorted_ = false;
            }
            sort_list();
            for (const Key k : list()) out.kept.push_back(id_of(O::index(k)));
        }
        if (need & (kNeedLogprob | kNeedTemperature | kNeedMass | kNeedEntropy)) probabilities(index, greedy, out);
        if (need & kNeedRaw) raw(row, out);
    }

    int64_t rank_of(Key drawn) const {
        int64_t count = 0;
        const F* maxima = s_.template maxima<F>().data();
        for (int64_t b = 0; b < block_count(); ++b) {
            if (O::key(maxima[b], 0) < drawn) continue;
            for (int64_t i = b * kBlock; i < block_end(b); ++i) count += O::key(x_[i], static_cast<uint32_t>(i)) > drawn;
        }
        return count;
    }

    void probabilities(uint32_t index, bool greedy, Result& out) const {
        const double z = z_of(x_[index]);
        double kept = 0, moment = 0, all = 0;
        auto add = [&](double zi) {
            const double e = noise_exp(zi);
            kept += e;
            if (e > 0 && zi > -700.0) moment += e * zi;
        };
        if (greedy) {
            kept = all = 1;
        } else {
            if (have_list_)
                for (const Key k : s_.template keys<Key>()) add(z_of(k));
            else
                for (int64_t i = 0; i < n_; ++i)
                    if (keeps(x_[i], static_cast<uint32_t>(i))) add(z_of(x_[i]));
            if (job_.need & (kNeedTemperature | kNeedMass)) {
                all = sum_exp<F>(x_, n_, wide_max_, temperature_);
            }
        }
        out.logprob = z - std::log(kept);
        out.temperature = z - std::log(all);
        out.mass = kept / all;
        out.entropy = std::log(kept) - moment / kept;
    }

    void raw(int64_t row, Result& out) const {
        auto& values = s_.template raw<F>();
        values.resize(in_.vocabulary);
        widen<F>(in_, in_.data + row * in_.row_bytes, values.data());
        F top = -INFINITY;
        for (const F v : values) top = v > top ? v : top;
        const double m = static_cast<double>(top);
        const double sum = sum_exp<F>(values.data(), in_.vocabulary, m, 1.0);
        out.raw = static_cast<double>(values[out.token]) - m - std::log(sum);
    }

    const Logits& in_;
    const Job& job_;
    Scratch& s_;
    const F* x_ = nullptr;
    const int64_t* ids_ = nullptr;
    int64_t n_ = 0;
    F max_ = 0;
    double wide_max_ = 0, temperature_ = 1, log_min_p_ = -INFINITY;
    Key cut_ = 0;
    Run run_;  // of the draw
    bool have_list_ = false, sorted_ = false;
};

int run_row(const Logits& in, const Job& job, Scratch& scratch, int64_t row, Result& out) {
    if (in.type == kFloat64) return Chain<double>(in, job, scratch).run(row, out);
    return Chain<float>(in, job, scratch).run(row, out);
}
