// Passes over contiguous logits and over noise: maxima, comparisons, widening. A part of sampling_level.hpp.

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
