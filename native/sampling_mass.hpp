// Exponentials of contiguous logits: masses in fixed point, and sums that are near them. A part of sampling_level.hpp.

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
