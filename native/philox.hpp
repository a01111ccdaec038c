// Philox4x32-10: one block (constexpr, checked against the published vectors) and runs of 16-bit lanes, with the
// instruction set chosen at run time. The readable twin is src/twodice/random/philox.py. Knows nothing of dropout.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TWODICE_X86 1
#include <immintrin.h>
#define TWODICE_AVX2 __attribute__((target("avx2,f16c")))
#define TWODICE_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define TWODICE_INLINE inline __attribute__((always_inline))
#define TWODICE_NEON 0
#elif defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define TWODICE_X86 0
#define TWODICE_NEON 1  // a part of every such processor: nothing to ask at run time
#include <arm_neon.h>
#define TWODICE_INLINE inline __attribute__((always_inline))
#else
#define TWODICE_X86 0
#define TWODICE_NEON 0
#define TWODICE_INLINE inline
#endif

namespace twodice {

// The instruction sets of this architecture, the least first.
#if TWODICE_X86
enum class Simd : int { portable, avx2, avx512 };
constexpr const char* kSimdNames[] = {"portable", "avx2", "avx512"};
#elif TWODICE_NEON
enum class Simd : int { portable, neon };
constexpr const char* kSimdNames[] = {"portable", "neon"};
#else
enum class Simd : int { portable };
constexpr const char* kSimdNames[] = {"portable"};
#endif

inline Simd best_simd() {
#if TWODICE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return Simd::avx512;
    if (avx2) return Simd::avx2;
#elif TWODICE_NEON
    return Simd::neon;
#endif
    return Simd::portable;
}

// The level in use: the best of this machine unless a test lowers it. It changes speed only.
inline std::atomic<Simd>& simd_level() {
    static std::atomic<Simd> level{best_simd()};
    return level;
}

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

struct Words {
    uint32_t w0, w1, w2, w3;
};

constexpr Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c0, p1 = static_cast<uint64_t>(kMultiplier1) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    return {c0, c1, c2, c3};
}

constexpr bool equal(Words a, Words b) { return a.w0 == b.w0 && a.w1 == b.w1 && a.w2 == b.w2 && a.w3 == b.w3; }
static_assert(equal(philox4x32(0, 0, 0, 0, 0), {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
static_assert(equal(philox4x32(~0u, ~0u, ~0u, ~0u, ~0ull), {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
static_assert(equal(philox4x32(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0x299f31d0a4093822ull),
                    {0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u}));

// What a run of counters that differ in c0 alone has in common: the keys of all rounds, and the first two rounds as
// far as c0 does not enter them.
struct Run {
    uint32_t k0[kRounds], k1[kRounds];
    uint32_t first_c2;             // c3 ^ k1 of round 0, to which the high half of M0 * c0 is added
    uint32_t second_c0, second_c2, second_c3;  // likewise after round 1

    Run() = default;

    // Set once a call.
    void set_key(uint64_t key) {
        k0[0] = static_cast<uint32_t>(key);
        k1[0] = static_cast<uint32_t>(key >> 32);
        for (int i = 1; i < kRounds; ++i) k0[i] = k0[i - 1] + kWeyl0, k1[i] = k1[i - 1] + kWeyl1;
    }
    // Set once a row.
    void set_row(uint32_t c1, uint32_t c2, uint32_t c3) {
        const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c2;
        const uint32_t after0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0[0];
        first_c2 = c3 ^ k1[0];
        const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * after0;
        second_c0 = static_cast<uint32_t>(p1) ^ k0[1];
        second_c2 = static_cast<uint32_t>(p0 >> 32) ^ k1[1];
        second_c3 = static_cast<uint32_t>(p0);
    }
};

// 64 lanes (8 counters from c0 on) into out, as little-endian pairs.
inline void lanes64_portable(const Run& run, uint32_t c0, uint16_t* out) {
    uint32_t a[8], b[8], c[8], d[8];
    for (int i = 0; i < 8; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * (c0 + static_cast<uint32_t>(i));
        const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ run.first_c2;
        const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c2;
        a[i] = static_cast<uint32_t>(p1 >> 32) ^ run.second_c0;
        b[i] = static_cast<uint32_t>(p1);
        c[i] = static_cast<uint32_t>(p0) ^ run.second_c2;
        d[i] = run.second_c3;
    }
    for (int round = 2; round < kRounds; ++round) {
        const uint32_t k0 = run.k0[round], k1 = run.k1[round];
        for (int i = 0; i < 8; ++i) {
            const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * a[i];
            const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c[i];
            a[i] = static_cast<uint32_t>(p1 >> 32) ^ b[i] ^ k0;
            c[i] = static_cast<uint32_t>(p0 >> 32) ^ d[i] ^ k1;
            b[i] = static_cast<uint32_t>(p1);
            d[i] = static_cast<uint32_t>(p0);
        }
    }
    for (int i = 0; i < 8; ++i) {
        const uint32_t words[4] = {a[i], b[i], c[i], d[i]};
        for (int w = 0; w < 4; ++w) {
            out[8 * i + 2 * w] = static_cast<uint16_t>(words[w]);
            out[8 * i + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
        }
    }
}

#if TWODICE_X86
// A 64-bit lane holds one counter's 32-bit word below and rubbish above: the multiplication reads the low half only, so
// the low half of a product needs no masking and the high half no blending. Eight operations a round for 4 counters.
struct KeysAvx2 {
    __m256i k0[kRounds], k1[kRounds];
};

TWODICE_AVX2 inline void spread_keys(const Run& run, KeysAvx2& keys) {
    for (int i = 0; i < kRounds; ++i) {
        keys.k0[i] = _mm256_set1_epi64x(run.k0[i]);
        keys.k1[i] = _mm256_set1_epi64x(run.k1[i]);
    }
}

// The words of 4 counters a group, ab with the first two of each counter side by side, cd with the other two, in the order
// that store_lanes puts right. Two groups stand beside each other, since one waits for its own products.
template <int Groups>
TWODICE_AVX2 TWODICE_INLINE void words_avx2(const Run& run, const KeysAvx2& keys, uint32_t c0, __m256i* ab, __m256i* cd) {
    const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
    const __m256i first_c2 = _mm256_set1_epi64x(run.first_c2), second_c0 = _mm256_set1_epi64x(run.second_c0);
    const __m256i second_c2 = _mm256_set1_epi64x(run.second_c2), second_c3 = _mm256_set1_epi64x(run.second_c3);
    __m256i a[Groups], b[Groups], c[Groups], d[Groups];
    for (int g = 0; g < Groups; ++g) {
        // The order 0, 2, 1, 3 makes the unpacking at the end put counters side by side.
        const __m256i counter =
            _mm256_add_epi32(_mm256_set1_epi64x(c0), _mm256_set_epi64x(4 * g + 3, 4 * g + 1, 4 * g + 2, 4 * g));
        const __m256i p0 = _mm256_mul_epu32(counter, m0);
        const __m256i p1 = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), first_c2), m1);
        a[g] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), second_c0);
        b[g] = p1;
        c[g] = _mm256_xor_si256(p0, second_c2);
        d[g] = second_c3;
    }
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
        for (int g = 0; g < Groups; ++g) {
            const __m256i p0 = _mm256_mul_epu32(a[g], m0), p1 = _mm256_mul_epu32(c[g], m1);
            a[g] = _mm256_xor_si256(_mm256_xor_si256(b[g], keys.k0[round]), _mm256_srli_epi64(p1, 32));
            c[g] = _mm256_xor_si256(_mm256_xor_si256(d[g], keys.k1[round]), _mm256_srli_epi64(p0, 32));
            b[g] = p1;
            d[g] = p0;
        }
    }
    for (int g = 0; g < Groups; ++g) {
        ab[g] = _mm256_blend_epi32(a[g], _mm256_slli_epi64(b[g], 32), 0xAA);
        cd[g] = _mm256_blend_epi32(c[g], _mm256_slli_epi64(d[g], 32), 0xAA);
    }
}

TWODICE_AVX2 TWODICE_INLINE void store_lanes(__m256i ab, __m256i cd, uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(ab, cd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi64(ab, cd));
}

// Groups = 1: 32 lanes; Groups = 2: 64 lanes.
template <int Groups>
TWODICE_AVX2 TWODICE_INLINE void lanes_avx2(const Run& run, const KeysAvx2& keys, uint32_t c0, uint16_t* out) {
    __m256i ab[Groups], cd[Groups];
    words_avx2<Groups>(run, keys, c0, ab, cd);
    for (int g = 0; g < Groups; ++g) store_lanes(ab[g], cd[g], out + 32 * g);
}

struct KeysAvx512 {
    __m512i k0[kRounds], k1[kRounds];
};

TWODICE_AVX512 inline void spread_keys(const Run& run, KeysAvx512& keys) {
    for (int i = 0; i < kRounds; ++i) {
        keys.k0[i] = _mm512_set1_epi64(run.k0[i]);
        keys.k1[i] = _mm512_set1_epi64(run.k1[i]);
    }
}

// The high word of each 64-bit lane, moved down. A shuffle and no shift: shifts share their one port with the products.
TWODICE_AVX512 TWODICE_INLINE __m512i high_words(__m512i v) {
    return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xF5));
}

// The words of 8 counters a group, as words_avx2; the exclusive or of three is one instruction here.
template <int Groups>
TWODICE_AVX512 TWODICE_INLINE void words_avx512(const Run& run, const KeysAvx512& keys, uint32_t c0, __m512i* ab,
                                                __m512i* cd) {
    const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
    const __m512i first_c2 = _mm512_set1_epi64(run.first_c2), second_c0 = _mm512_set1_epi64(run.second_c0);
    const __m512i second_c2 = _mm512_set1_epi64(run.second_c2), second_c3 = _mm512_set1_epi64(run.second_c3);
    __m512i a[Groups], b[Groups], c[Groups], d[Groups];
    for (int g = 0; g < Groups; ++g) {
        const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
        const __m512i counter = _mm512_add_epi32(_mm512_set1_epi64(c0 + 8u * static_cast<uint32_t>(g)), order);
        const __m512i p0 = _mm512_mul_epu32(counter, m0);
        const __m512i p1 = _mm512_mul_epu32(_mm512_xor_si512(high_words(p0), first_c2), m1);
        a[g] = _mm512_xor_si512(high_words(p1), second_c0);
        b[g] = p1;
        c[g] = _mm512_xor_si512(p0, second_c2);
        d[g] = second_c3;
    }
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
        for (int g = 0; g < Groups; ++g) {
            const __m512i p0 = _mm512_mul_epu32(a[g], m0), p1 = _mm512_mul_epu32(c[g], m1);
            a[g] = _mm512_ternarylogic_epi64(high_words(p1), b[g], keys.k0[round], 0x96);
            c[g] = _mm512_ternarylogic_epi64(high_words(p0), d[g], keys.k1[round], 0x96);
            b[g] = p1;
            d[g] = p0;
        }
    }
    // The low words of b and d into the high halves of a and c: one shuffle each.
    for (int g = 0; g < Groups; ++g) {
        ab[g] = _mm512_mask_shuffle_epi32(a[g], 0xAAAA, b[g], static_cast<_MM_PERM_ENUM>(0xA0));
        cd[g] = _mm512_mask_shuffle_epi32(c[g], 0xAAAA, d[g], static_cast<_MM_PERM_ENUM>(0xA0));
    }
}

TWODICE_AVX512 TWODICE_INLINE void store_lanes(__m512i ab, __m512i cd, uint16_t* out) {
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(ab, cd));
}

// 64 lanes a group.
template <int Groups>
TWODICE_AVX512 TWODICE_INLINE void lanes_avx512(const Run& run, const KeysAvx512& keys, uint32_t c0, uint16_t* out) {
    __m512i ab[Groups], cd[Groups];
    words_avx512<Groups>(run, keys, c0, ab, cd);
    for (int g = 0; g < Groups; ++g) store_lanes(ab[g], cd[g], out + 64 * g);
}

TWODICE_AVX2 inline void fill_avx2(const Run& run, uint32_t c0, size_t blocks, uint16_t* out) {
    KeysAvx2 keys;
    spread_keys(run, keys);
    for (size_t i = 0; i < blocks; ++i) lanes_avx2<2>(run, keys, c0 + 8u * static_cast<uint32_t>(i), out + 64 * i);
}

TWODICE_AVX512 inline void fill_avx512(const Run& run, uint32_t c0, size_t blocks, uint16_t* out) {
    KeysAvx512 keys;
    spread_keys(run, keys);
    size_t i = 0;
    for (; i + 4 <= blocks; i += 4)
        lanes_avx512<4>(run, keys, c0 + 8u * static_cast<uint32_t>(i), out + 64 * i);
    for (; i < blocks; ++i) lanes_avx512<1>(run, keys, c0 + 8u * static_cast<uint32_t>(i), out + 64 * i);
}
#endif

#if TWODICE_NEON
// 32-bit lanes here, as the wide product takes its factors side by side: it gives 64-bit pairs, whose halves two
// unzips part again.
TWODICE_INLINE void product(uint32x4_t x, uint32_t multiplier, uint32x4_t& low, uint32x4_t& high) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(x), multiplier));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_n_u32(x, multiplier));
    low = vuzp1q_u32(first, second);
    high = vuzp2q_u32(first, second);
}

// 32 lanes a group (4 counters); two groups stand side by side, since one waits for its own products.
template <int Groups>
TWODICE_INLINE void lanes_neon(const Run& run, uint32_t c0, uint16_t* out) {
    uint32x4_t a[Groups], b[Groups], c[Groups], d[Groups], high0, high1;
    for (int g = 0; g < Groups; ++g) {
        const uint32x4_t order = {0, 1, 2, 3};
        const uint32x4_t counter = vaddq_u32(vdupq_n_u32(c0 + 4u * static_cast<uint32_t>(g)), order);
        product(counter, kMultiplier0, c[g], high0);
        product(veorq_u32(high0, vdupq_n_u32(run.first_c2)), kMultiplier1, b[g], high1);
        a[g] = veorq_u32(high1, vdupq_n_u32(run.second_c0));
        c[g] = veorq_u32(c[g], vdupq_n_u32(run.second_c2));
        d[g] = vdupq_n_u32(run.second_c3);
    }
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
        const uint32x4_t k0 = vdupq_n_u32(run.k0[round]), k1 = vdupq_n_u32(run.k1[round]);
        for (int g = 0; g < Groups; ++g) {
            uint32x4_t low0, low1;
            product(a[g], kMultiplier0, low0, high0);
            product(c[g], kMultiplier1, low1, high1);
            a[g] = veorq_u32(veorq_u32(b[g], k0), high1);
            c[g] = veorq_u32(veorq_u32(d[g], k1), high0);
            b[g] = low1;
            d[g] = low0;
        }
    }
    for (int g = 0; g < Groups; ++g) {
        const uint32x4x2_t ab = vzipq_u32(a[g], b[g]), cd = vzipq_u32(c[g], d[g]);
        for (int h = 0; h < 2; ++h) {
            const uint64x2_t x = vreinterpretq_u64_u32(ab.val[h]), y = vreinterpretq_u64_u32(cd.val[h]);
            vst1q_u16(out + 32 * g + 16 * h, vreinterpretq_u16_u64(vzip1q_u64(x, y)));
            vst1q_u16(out + 32 * g + 16 * h + 8, vreinterpretq_u16_u64(vzip2q_u64(x, y)));
        }
    }
}
#endif

// Lanes of `counters` consecutive counters (c0, c1, c2, c3), (c0 + 1, ...), eight each, into `out`. `run` has its key
// and its row. Exactly 8 * counters values are written.
inline void fill_lanes(const Run& run, uint32_t c0, size_t counters, uint16_t* out) {
    const size_t blocks = counters / 8, rest = counters % 8;
    switch (simd_level().load(std::memory_order_relaxed)) {
#if TWODICE_X86
        case Simd::avx512: fill_avx512(run, c0, blocks, out); break;
        case Simd::avx2: fill_avx2(run, c0, blocks, out); break;
#endif
#if TWODICE_NEON
        case Simd::neon:
            for (size_t i = 0; i < blocks; ++i) lanes_neon<2>(run, c0 + 8u * static_cast<uint32_t>(i), out + 64 * i);
            break;
#endif
        default:
            for (size_t i = 0; i < blocks; ++i) lanes64_portable(run, c0 + 8u * static_cast<uint32_t>(i), out + 64 * i);
    }
    if (rest) {
        uint16_t last[64];
        lanes64_portable(run, c0 + 8u * static_cast<uint32_t>(blocks), last);
        std::memcpy(out + 64 * blocks, last, 16 * rest);
    }
}

}  // namespace twodice
