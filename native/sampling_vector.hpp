// Passes over contiguous logits. Included once for each instruction set, inside a namespace of its own (see sampling.cpp).
// No include guard on purpose, and no system header: those belong outside the target region.

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

// Fixed-point masses of `count` logits.
template <class F>
inline void weigh(const F* x, int64_t count, double m, double t, int64_t* weight) {
    int64_t j = 0;
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
    for (int64_t j = 0; j < count; ++j) {
        const double z = (static_cast<double>(x[j]) - m) / t;
        weight[j] = noise_weight(z);
        const double steep = noise_exp(z) * -(weight[j] > 0 ? z : 0.0);
        moment[j] = bits_of<int64_t>(steep * 0x1p42 + kRound) - kRoundBits;
    }
}

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

