// Passes over contiguous logits. A part of sampling_level.hpp.

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

#ifdef TWODICE_LEVEL_AVX512
template <>
inline float block_max<float>(const float* x, int64_t count, bool& bad) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 best = none, other = none;
    __mmask16 nan = 0;
    int64_t j = 0;
    for (; j + 32 <= count; j += 32) {
        const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + 16);
        nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q));
        best = _mm512_max_ps(best, a);
        other = _mm512_max_ps(other, b);
    }
    for (; j < count; j += 16) {
        const __mmask16 there = count - j < 16 ? static_cast<__mmask16>((1u << (count - j)) - 1) : 0xFFFF;
        const __m512 a = _mm512_mask_loadu_ps(none, there, x + j);
        nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
        best = _mm512_max_ps(best, a);
    }
    bad |= nan != 0;
    return _mm512_reduce_max_ps(_mm512_max_ps(best, other));
}
#elif defined(TWODICE_LEVEL_AVX2)
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

// Largest of `count` bfloat16 numbers, as block_max.
inline float block_max16(const uint16_t* x, int64_t count, bool& bad) {
    float best = -INFINITY;
    int nan = 0;
    int64_t j = 0;
    // A word holds two of them; each is a float32 when the other one's bits are 0.
#if defined(TWODICE_LEVEL_AVX512)
    __m512 low = _mm512_set1_ps(-INFINITY), high = low;
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    __mmask16 found = 0;
    for (; j + 32 <= count; j += 32) {
        const __m512i words = _mm512_loadu_si512(x + j);
        const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(words, mask));
        found = static_cast<__mmask16>(found | _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q));
        low = _mm512_max_ps(low, a);
        high = _mm512_max_ps(high, b);
    }
    best = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
    nan = found != 0;
#elif defined(TWODICE_LEVEL_AVX2)
    __m256 low = _mm256_set1_ps(-INFINITY), high = low, found = _mm256_setzero_ps();
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (; j + 16 <= count; j += 16) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j));
        const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        const __m256 b = _mm256_castsi256_ps(_mm256_and_si256(words, mask));
        found = _mm256_or_ps(found, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
        low = _mm256_max_ps(low, a);
        high = _mm256_max_ps(high, b);
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_max_ps(low, high));
    for (const float lane : lanes) best = lane > best ? lane : best;
    nan = _mm256_movemask_ps(found) != 0;
#endif
    for (; j < count; ++j) {
        const float value = bits_of<float>(uint32_t{x[j]} << 16);
        nan |= value != value;
        best = value > best ? value : best;
    }
    bad |= nan != 0;
    return best;
}

// The first place of a value that is there.
template <class F>
inline int64_t first_equal(const F* x, F value) {
    int64_t j = 0;
    while (!(x[j] == value)) ++j;
    return j;
}

// How many of `count` numbers are at least `bound`.
template <class F>
inline int64_t count_from(const F* x, int64_t count, F bound) {
    int32_t lanes[16] = {};
    int64_t j = 0, found = 0;
    for (; j + 16 <= count; j += 16)
        for (int i = 0; i < 16; ++i) lanes[i] += x[j + i] >= bound;
    for (; j < count; ++j) found += x[j] >= bound;
    for (const int32_t lane : lanes) found += lane;
    return found;
}

// Which of `count` numbers, at most 64, lie between two bounds, both included: a bit each.
template <class F>
inline uint64_t within(const F* x, int64_t count, F low, F high) {
    uint64_t out = 0;
    int64_t j = 0;
#if defined(TWODICE_LEVEL_AVX512)
    if constexpr (sizeof(F) == 4) {
        const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
        for (; j + 16 <= count; j += 16) {
            const __m512 v = _mm512_loadu_ps(x + j);
            const __mmask16 up = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
            out |= static_cast<uint64_t>(_mm512_mask_cmp_ps_mask(up, v, most, _CMP_LE_OQ)) << j;
        }
    }
#elif defined(TWODICE_LEVEL_AVX2)
    if constexpr (sizeof(F) == 4) {
        const __m256 least = _mm256_set1_ps(low), most = _mm256_set1_ps(high);
        for (; j + 8 <= count; j += 8) {
            const __m256 v = _mm256_loadu_ps(x + j);
            const __m256 in = _mm256_and_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ), _mm256_cmp_ps(v, most, _CMP_LE_OQ));
            out |= static_cast<uint64_t>(static_cast<unsigned>(_mm256_movemask_ps(in))) << j;
        }
    }
#endif
    for (; j < count; ++j) out |= static_cast<uint64_t>(x[j] >= low && x[j] <= high) << j;
    return out;
}

// Which of 64 lanes are at most `limit`: a bit each.
inline uint64_t low_lanes(const uint16_t* lanes, uint16_t limit) {
#if defined(TWODICE_LEVEL_AVX512)
    const __m512i most = _mm512_set1_epi16(static_cast<int16_t>(limit));
    const uint64_t low = _mm512_cmple_epu16_mask(_mm512_loadu_si512(lanes), most);
    const uint64_t high = _mm512_cmple_epu16_mask(_mm512_loadu_si512(lanes + 32), most);
    return low | high << 32;
#elif defined(TWODICE_LEVEL_AVX2)
    const __m256i most = _mm256_set1_epi16(static_cast<int16_t>(limit));
    uint64_t out = 0;
    for (int j = 0; j < 64; j += 32) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + j));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + j + 16));
        const __m256i c = _mm256_cmpeq_epi16(_mm256_min_epu16(a, most), a);
        const __m256i d = _mm256_cmpeq_epi16(_mm256_min_epu16(b, most), b);
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(c, d), 0xD8);
        out |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(both))} << j;
    }
    return out;
#else
    uint16_t any = 0;
    for (int j = 0; j < 64; ++j) any |= lanes[j] <= limit;
    if (any == 0) return 0;
    uint64_t out = 0;
    for (int j = 0; j < 64; ++j) out |= uint64_t{lanes[j] <= limit} << j;
    return out;
#endif
}

// The 16 leading bits of `count` ids in any order, and their bounds on the noise (gumbel_bound).
inline void leading_bounds(const Place& at, const uint32_t* ids, int64_t count, uint32_t* high, double* bound) {
    constexpr int64_t kGroup = 16;
    for (int64_t begin = 0; begin < count; begin += kGroup) {
        const int64_t n = count - begin < kGroup ? count - begin : kGroup;
        uint32_t own[kGroup] = {};
        std::copy_n(ids + begin, n, own);
        uint32_t c0[kGroup], c1[kGroup], c2[kGroup], c3[kGroup];
        for (int i = 0; i < kGroup; ++i)
            c0[i] = own[i] >> 3, c1[i] = at.position, c2[i] = at.completion, c3[i] = at.purpose;
        uint32_t k0 = static_cast<uint32_t>(at.key), k1 = static_cast<uint32_t>(at.key >> 32);
        for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1)
            for (int i = 0; i < kGroup; ++i) {
                const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c0[i];
                const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c2[i];
                c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
                c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
                c1[i] = static_cast<uint32_t>(p1);
                c3[i] = static_cast<uint32_t>(p0);
            }
        uint32_t found[kGroup];
        for (int i = 0; i < kGroup; ++i) {
            const uint32_t lane = own[i] & 7, left = lane & 2 ? c1[i] : c0[i], right = lane & 2 ? c3[i] : c2[i];
            const uint32_t word = lane & 4 ? right : left;
            found[i] = (word >> ((lane & 1) << 4)) & 0xFFFFu;
        }
        std::copy_n(found, n, high + begin);
        for (int64_t i = 0; i < n; ++i) bound[begin + i] = gumbel_bound(found[i]);
    }
}

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

#ifdef TWODICE_LEVEL_AVX512
// noise_exp of eight numbers, the same operations.
inline __m512d exp8(__m512d z) {
    const __m512d low = _mm512_max_pd(z, _mm512_set1_pd(-700.0)), round = _mm512_set1_pd(kRound);
    const __m512d shifted = _mm512_add_pd(_mm512_mul_pd(low, _mm512_set1_pd(kLog2E)), round);
    const __m512d n = _mm512_sub_pd(shifted, round);
    const __m512d r = _mm512_sub_pd(_mm512_sub_pd(low, _mm512_mul_pd(n, _mm512_set1_pd(kLn2High))),
                                    _mm512_mul_pd(n, _mm512_set1_pd(kLn2Low)));
    constexpr double c[11] = {1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
                              1.0 / 24.0,      1.0 / 6.0,      0.5,           1.0,          1.0};
    __m512d y = _mm512_set1_pd(1.0 / 39916800.0);
#pragma GCC unroll 11
    for (const double term : c) y = _mm512_add_pd(_mm512_mul_pd(y, r), _mm512_set1_pd(term));
    const __m512i scale = _mm512_add_epi64(_mm512_slli_epi64(_mm512_castpd_si512(shifted), 52),
                                           _mm512_set1_epi64(kOneBits));
    return _mm512_mul_pd(y, _mm512_castsi512_pd(scale));
}

inline __m512d load8(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
inline __m512d load8(const double* x) { return _mm512_loadu_pd(x); }
#endif

inline __m256d load4(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
inline __m256d load4(const double* x) { return _mm256_loadu_pd(x); }
#endif

// Fixed-point masses of `count` logits.
template <class F>
inline void weigh(const F* x, int64_t count, double m, double t, int64_t* weight) {
    int64_t j = 0;
#ifdef TWODICE_LEVEL_AVX512
    const __m512d top8 = _mm512_set1_pd(m), warm8 = _mm512_set1_pd(t), round8 = _mm512_set1_pd(kRound);
    for (; j + 8 <= count; j += 8) {
        __m512d z = _mm512_sub_pd(load8(x + j), top8);
        if (t != 1.0) z = _mm512_div_pd(z, warm8);
        const __m512d scaled = _mm512_add_pd(_mm512_mul_pd(exp8(z), _mm512_set1_pd(0x1p42)), round8);
        _mm512_storeu_si512(weight + j, _mm512_sub_epi64(_mm512_castpd_si512(scaled), _mm512_set1_epi64(kRoundBits)));
    }
#endif
#ifdef TWODICE_LEVEL_AVX2
    const __m256d top = _mm256_set1_pd(m), warm = _mm256_set1_pd(t), round = _mm256_set1_pd(kRound);
    for (; j + 4 <= count; j += 4) {
        __m256d z = _mm256_sub_pd(load4(x + j), top);
        if (t != 1.0) z = _mm256_div_pd(z, warm);
        const __m256d scaled = _mm256_add_pd(_mm256_mul_pd(exp4(z), _mm256_set1_pd(0x1p42)), round);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight + j),
                            _mm256_sub_epi64(_mm256_castpd_si256(scaled), _mm256_set1_epi64x(kRoundBits)));
    }
#endif
    for (; j < count; ++j) weight[j] = noise_weight((static_cast<double>(x[j]) - m) / t);
}

// The same, and round(exp(z) * -z * 2^42), which is 0 where the mass is.
template <class F>
inline void weigh_moments(const F* x, int64_t count, double m, double t, int64_t* weight, int64_t* moment) {
    int64_t j = 0;
#ifdef TWODICE_LEVEL_AVX512
    const __m512d top8 = _mm512_set1_pd(m), warm8 = _mm512_set1_pd(t), round8 = _mm512_set1_pd(kRound);
    const __m512d unit8 = _mm512_set1_pd(0x1p42);
    const __m512i bits8 = _mm512_set1_epi64(kRoundBits);
    for (; j + 8 <= count; j += 8) {
        __m512d z = _mm512_sub_pd(load8(x + j), top8);
        if (t != 1.0) z = _mm512_div_pd(z, warm8);
        const __m512d e = exp8(z);
        const __m512i w = _mm512_sub_epi64(_mm512_castpd_si512(_mm512_add_pd(_mm512_mul_pd(e, unit8), round8)), bits8);
        const __mmask8 some = _mm512_cmpgt_epi64_mask(w, _mm512_setzero_si512());
        const __m512d less = _mm512_maskz_sub_pd(some, _mm512_setzero_pd(), z);
        const __m512d steep = _mm512_add_pd(_mm512_mul_pd(_mm512_mul_pd(e, less), unit8), round8);
        _mm512_storeu_si512(weight + j, w);
        _mm512_storeu_si512(moment + j, _mm512_sub_epi64(_mm512_castpd_si512(steep), bits8));
    }
#endif
#ifdef TWODICE_LEVEL_AVX2
    const __m256d top = _mm256_set1_pd(m), warm = _mm256_set1_pd(t), round = _mm256_set1_pd(kRound);
    const __m256d unit = _mm256_set1_pd(0x1p42);
    const __m256i bits = _mm256_set1_epi64x(kRoundBits);
    for (; j + 4 <= count; j += 4) {
        __m256d z = _mm256_sub_pd(load4(x + j), top);
        if (t != 1.0) z = _mm256_div_pd(z, warm);
        const __m256d e = exp4(z);
        const __m256i w = _mm256_sub_epi64(_mm256_castpd_si256(_mm256_add_pd(_mm256_mul_pd(e, unit), round)), bits);
        const __m256d some = _mm256_castsi256_pd(_mm256_cmpgt_epi64(w, _mm256_setzero_si256()));
        const __m256d less = _mm256_and_pd(some, _mm256_sub_pd(_mm256_setzero_pd(), z));
        const __m256d steep = _mm256_add_pd(_mm256_mul_pd(_mm256_mul_pd(e, less), unit), round);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight + j), w);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(moment + j), _mm256_sub_epi64(_mm256_castpd_si256(steep), bits));
    }
#endif
    for (; j < count; ++j) {
        const double z = (static_cast<double>(x[j]) - m) / t;
        weight[j] = noise_weight(z);
        const double steep = noise_exp(z) * -(weight[j] > 0 ? z : 0.0);
        moment[j] = bits_of<int64_t>(steep * 0x1p42 + kRound) - kRoundBits;
    }
}

// What a sum of float32 exponentials may be wrong by, as a share of the sum of masses of the whole row. The difference
// to the top and its way to a power of two round by 2^-24 four times, of 31 at most where a mass counts: 2^-17.1; the
// exponential and the sums are wrong by less than 2^-18; a mass is a multiple of 2^-42, 2^20 of them are wrong by 2^-23.
constexpr double kRough = 0x1p-16;

#if defined(TWODICE_LEVEL_AVX512)
using Vector16 = Vector16Avx512;
#elif defined(TWODICE_LEVEL_AVX2)
using Vector16 = Vector16Avx2;
#else
using Vector16 = Vector16Portable;
#endif

// Sums over values of a row, of all and of those above a bound.
struct Rough {
    double all = 0, above = 0;
};

// Adds share(values) of `count` values, a multiple of 16 and not more than float32 adds up well.
template <class Share>
inline void add_rough(const float* x, int64_t count, float bound, Share share, Rough& out) {
    using V = Vector16;
    V::F all = V::all(0.0f), above = all;
    for (int64_t j = 0; j < count; j += 16) {
        const V::F value = V::load(x + j), e = share(value);
        all = V::add(all, e);
        above = V::add(above, V::or_zero(V::greater(value, bound), e));
    }
    out.all += static_cast<double>(V::sum(all));
    out.above += static_cast<double>(V::sum(above));
}

// Sums of exp(z) and of z exp(z), in float64 and in no promised order; what has no mass (z may be -inf) has no moment.
struct Sums {
    double mass = 0, moment = 0;
    void add(double z) {
        const double e = z > -700.0 ? noise_exp(z) : 0.0;
        mass += e;
        if (e > 0) moment += e * z;
    }
};

template <class F>
inline void sum_exps(const F* x, int64_t count, double m, double t, Sums& sums) {
    int64_t j = 0;
#ifdef TWODICE_LEVEL_AVX512
    const __m512d top8 = _mm512_set1_pd(m), warm8 = _mm512_set1_pd(t), low8 = _mm512_set1_pd(-700.0);
    __m512d mass8 = _mm512_setzero_pd(), moment8 = _mm512_setzero_pd();
    for (; j + 8 <= count; j += 8) {
        __m512d z = _mm512_sub_pd(load8(x + j), top8);
        if (t != 1.0) z = _mm512_div_pd(z, warm8);
        const __m512d e = _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(z, low8, _CMP_GT_OQ), exp8(z));
        mass8 = _mm512_add_pd(mass8, e);
        moment8 = _mm512_add_pd(moment8, _mm512_mul_pd(e, _mm512_max_pd(z, low8)));
    }
    sums.mass += _mm512_reduce_add_pd(mass8);
    sums.moment += _mm512_reduce_add_pd(moment8);
#endif
#ifdef TWODICE_LEVEL_AVX2
    const __m256d top = _mm256_set1_pd(m), warm = _mm256_set1_pd(t), low = _mm256_set1_pd(-700.0);
    __m256d mass = _mm256_setzero_pd(), moment = _mm256_setzero_pd();
    for (; j + 4 <= count; j += 4) {
        __m256d z = _mm256_sub_pd(load4(x + j), top);
        if (t != 1.0) z = _mm256_div_pd(z, warm);
        const __m256d e = _mm256_and_pd(exp4(z), _mm256_cmp_pd(z, low, _CMP_GT_OQ));
        mass = _mm256_add_pd(mass, e);
        moment = _mm256_add_pd(moment, _mm256_mul_pd(e, _mm256_max_pd(z, low)));
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, mass);
    sums.mass += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    _mm256_storeu_pd(lanes, moment);
    sums.moment += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
#endif
    for (; j < count; ++j) sums.add((static_cast<double>(x[j]) - m) / t);
}

inline float widen_half(uint16_t h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3FFu;
    if (exponent == 31) return bits_of<float>(sign | 0x7F800000u | (fraction << 13));
    if (exponent != 0) return bits_of<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
}

// Values begin .. begin + n - 1 of a row of any type and stride, as contiguous F.
template <class F>
inline void widen(const Logits& in, const char* row, int64_t begin, int64_t n, F* out) {
    const int64_t step = in.column_stride;
    switch (in.type) {
        case kFloat32: {
            const float* p = reinterpret_cast<const float*>(row) + begin * step;
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<F>(p[i * step]);
            break;
        }
        case kBfloat16: {
            const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + begin * step;
            if (step == 1)
                for (int64_t i = 0; i < n; ++i) out[i] = bits_of<float>(uint32_t{p[i]} << 16);
            else
                for (int64_t i = 0; i < n; ++i) out[i] = bits_of<float>(uint32_t{p[i * step]} << 16);
            break;
        }
        case kFloat16: {
            const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + begin * step;
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
            const double* p = reinterpret_cast<const double*>(row) + begin * step;
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<F>(p[i * step]);
            break;
        }
    }
}
