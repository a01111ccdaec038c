// Sixteen float32 at a time, for three instruction sets, with what attention needs of them: arithmetic, the exponential,
// selection by 16-bit lanes, by bytes and by comparison. Results of the three agree to rounding. Knows no attention.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "philox.hpp"

namespace twodice {

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, and for exp(r) the polynomial of Cephes' expf (Moshier),
// within 2 units in the last place. Below kExpLow, and so at minus infinity, the result is 0; NaN stays NaN.
constexpr float kExpLow = -87.0f, kExpHigh = 88.0f, kLog2EFloat = 1.44269504088896341f;
constexpr float kLn2HighFloat = 0.693359375f, kLn2LowFloat = -2.12194440e-4f;
constexpr float kExp[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline float exp_of(float x) {
    if (x != x) return x;
    if (x < kExpLow) return 0.0f;
    x = x > kExpHigh ? kExpHigh : x;
    const float n = std::nearbyint(x * kLog2EFloat);
    const float r = (x - n * kLn2HighFloat) - n * kLn2LowFloat;
    float p = kExp[0];
    for (int i = 1; i < 6; ++i) p = p * r + kExp[i];
    p = p * (r * r) + r + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
}

// exp(x) for x <= 0 and slope = 2^23 / ln 2: the bits of a float read as an integer are 2^23 times a logarithm that is
// straight between powers of two, so the result is at most kLinear times too large and never too small, but for rounding;
// below 2^-126 it is 0. Schraudolph, Neural Computation 11, 1999.
constexpr float kOneAsInteger = 0x3F800000, kLinearSlope = 12102203.16f;
constexpr double kLinear = 1.0615;

inline float exp_linear_of(float x, float slope) {
    const float y = x * slope + kOneAsInteger;
    const uint32_t bits = static_cast<uint32_t>(y > 0.0f ? static_cast<int32_t>(y) : 0);
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
}

struct Vector16Portable {
    struct F {
        float v[16];
    };
    struct M {
        bool v[16];
    };
    template <class Op>
    static F each(Op op) {
        F out;
        for (int i = 0; i < 16; ++i) out.v[i] = op(i);
        return out;
    }
    static F load(const float* x) {
        F out;
        std::memcpy(out.v, x, sizeof(out.v));
        return out;
    }
    static void store(float* x, const F& a) { std::memcpy(x, a.v, sizeof(a.v)); }
    static F all(float x) { return each([&](int) { return x; }); }
    static F add(const F& a, const F& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    static F sub(const F& a, const F& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    static F mul(const F& a, const F& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    static F div(const F& a, const F& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
    static F mul_add(const F& a, const F& b, const F& c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static F max(const F& a, const F& b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static F exp(const F& a) { return each([&](int i) { return exp_of(a.v[i]); }); }
    static F exp_linear(const F& a, const F& slope) {
        return each([&](int i) { return exp_linear_of(a.v[i], slope.v[i]); });
    }
    static M kept(const uint16_t* lanes, uint16_t threshold) {
        M out;
        for (int i = 0; i < 16; ++i) out.v[i] = lanes[i] >= threshold;
        return out;
    }
    static M bytes(const uint8_t* x) {
        M out;
        for (int i = 0; i < 16; ++i) out.v[i] = x[i] != 0;
        return out;
    }
    static M greater(const F& a, float bound) {
        M out;
        for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] > bound;
        return out;
    }
    static F where(const M& m, const F& a, const F& b) { return each([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; }); }
    static F or_zero(const M& m, const F& a) { return each([&](int i) { return m.v[i] ? a.v[i] : 0.0f; }); }
    static float sum(const F& a) {
        float out = 0.0f;
        for (float x : a.v) out += x;
        return out;
    }
    static float top(const F& a) {
        float out = a.v[0];
        for (float x : a.v) out = x > out ? x : out;
        return out;
    }
};

#if TWODICE_X86
#define TWODICE_HERE TWODICE_AVX2 TWODICE_INLINE static
struct Vector16Avx2 {
    struct F {
        __m256 a, b;
    };
    struct M {
        __m256 a, b;
    };
    TWODICE_HERE F load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
    TWODICE_HERE void store(float* x, F v) { _mm256_storeu_ps(x, v.a), _mm256_storeu_ps(x + 8, v.b); }
    TWODICE_HERE F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    TWODICE_HERE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    TWODICE_HERE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    TWODICE_HERE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    TWODICE_HERE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    TWODICE_HERE F mul_add(F x, F y, F z) { return add(mul(x, y), z); }
    TWODICE_HERE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    TWODICE_HERE __m256 exp8(__m256 x) {
        const __m256 low = _mm256_set1_ps(kExpLow);
        const __m256 kept = _mm256_cmp_ps(x, low, _CMP_NLT_UQ);  // true for NaN
        // The second operand comes back where one is NaN, so x stays what it is.
        const __m256 y = _mm256_min_ps(_mm256_set1_ps(kExpHigh), _mm256_max_ps(low, x));
        const __m256 n = _mm256_round_ps(_mm256_mul_ps(y, _mm256_set1_ps(kLog2EFloat)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 r = _mm256_sub_ps(_mm256_sub_ps(y, _mm256_mul_ps(n, _mm256_set1_ps(kLn2HighFloat))),
                                       _mm256_mul_ps(n, _mm256_set1_ps(kLn2LowFloat)));
        __m256 p = _mm256_set1_ps(kExp[0]);
#pragma GCC unroll 5
        for (int i = 1; i < 6; ++i) p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(kExp[i]));
        p = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), _mm256_set1_ps(1.0f));
        const __m256i power =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(power)), kept);
    }
    TWODICE_HERE F exp(F x) { return {exp8(x.a), exp8(x.b)}; }
    TWODICE_HERE __m256 linear8(__m256 x, __m256 slope) {
        const __m256 y = _mm256_add_ps(_mm256_mul_ps(x, slope), _mm256_set1_ps(kOneAsInteger));
        return _mm256_castsi256_ps(_mm256_cvttps_epi32(_mm256_max_ps(y, _mm256_setzero_ps())));
    }
    TWODICE_HERE F exp_linear(F x, F slope) { return {linear8(x.a, slope.a), linear8(x.b, slope.b)}; }
    TWODICE_HERE M kept(const uint16_t* lanes, uint16_t threshold) {
        const __m256i lane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
        const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
        const __m256i m = _mm256_cmpeq_epi16(_mm256_max_epu16(lane, t), lane);
        return {_mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(m))),
                _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(m, 1)))};
    }
    TWODICE_HERE M bytes(const uint8_t* x) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        const __m256i zero = _mm256_setzero_si256();
        return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(v), zero)),
                _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)), zero))};
    }
    TWODICE_HERE M greater(F x, float bound) {
        const __m256 b = _mm256_set1_ps(bound);
        return {_mm256_cmp_ps(x.a, b, _CMP_GT_OQ), _mm256_cmp_ps(x.b, b, _CMP_GT_OQ)};
    }
    TWODICE_HERE F where(M m, F x, F y) { return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)}; }
    TWODICE_HERE F or_zero(M m, F x) { return {_mm256_and_ps(x.a, m.a), _mm256_and_ps(x.b, m.b)}; }
    TWODICE_HERE float sum(F x) {
        const __m256 both = _mm256_add_ps(x.a, x.b);
        __m128 v = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
    }
    TWODICE_HERE float top(F x) {
        const __m256 both = _mm256_max_ps(x.a, x.b);
        __m128 v = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        return _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps(v, v, 1)));
    }
};
#undef TWODICE_HERE

#define TWODICE_HERE TWODICE_AVX512 TWODICE_INLINE static
struct Vector16Avx512 {
    using F = __m512;
    using M = __mmask16;
    TWODICE_HERE F load(const float* x) { return _mm512_loadu_ps(x); }
    TWODICE_HERE void store(float* x, F v) { _mm512_storeu_ps(x, v); }
    TWODICE_HERE F all(float x) { return _mm512_set1_ps(x); }
    TWODICE_HERE F add(F x, F y) { return _mm512_add_ps(x, y); }
    TWODICE_HERE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
    TWODICE_HERE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
    TWODICE_HERE F div(F x, F y) { return _mm512_div_ps(x, y); }
    TWODICE_HERE F mul_add(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    TWODICE_HERE F max(F x, F y) { return _mm512_max_ps(x, y); }
    TWODICE_HERE F exp(F x) {
        const F low = _mm512_set1_ps(kExpLow);
        const M kept = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);  // true for NaN
        // The second operand comes back where one is NaN, so x stays what it is.
        const F y = _mm512_min_ps(_mm512_set1_ps(kExpHigh), _mm512_max_ps(low, x));
        const F n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(kLog2EFloat)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        F r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2HighFloat), y);
        r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2LowFloat), r);
        F p = _mm512_set1_ps(kExp[0]);
#pragma GCC unroll 5
        for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp[i]));
        p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
        return _mm512_maskz_scalef_ps(kept, p, n);
    }
    TWODICE_HERE F exp_linear(F x, F slope) {
        const F y = _mm512_fmadd_ps(x, slope, _mm512_set1_ps(kOneAsInteger));
        return _mm512_castsi512_ps(_mm512_cvttps_epi32(_mm512_max_ps(y, _mm512_setzero_ps())));
    }
    TWODICE_HERE M kept(const uint16_t* lanes, uint16_t threshold) {
        return _mm256_cmpge_epu16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)),
                                       _mm256_set1_epi16(static_cast<int16_t>(threshold)));
    }
    TWODICE_HERE M bytes(const uint8_t* x) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm_test_epi8_mask(v, v);
    }
    TWODICE_HERE M greater(F x, float bound) { return _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GT_OQ); }
    TWODICE_HERE F where(M m, F x, F y) { return _mm512_mask_blend_ps(m, y, x); }
    TWODICE_HERE F or_zero(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
    TWODICE_HERE float sum(F x) { return _mm512_reduce_add_ps(x); }
    TWODICE_HERE float top(F x) { return _mm512_reduce_max_ps(x); }
};
#undef TWODICE_HERE
#endif

}  // namespace twodice
