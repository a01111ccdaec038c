// Runs of 16-bit lanes of which only the low ones matter: they are compared where they were made, and written only near one
// that is low, which spares most of them the way through memory. Knows nothing of sampling.
#pragma once

#include "philox.hpp"

namespace twodice {

// Memory that is asked for while lanes are made, `step` bytes with each 64 of them: making lanes does not wait for memory,
// and an even stream of requests lets it go on.
struct Ahead {
    const char* from = nullptr;
    int step = 0;
    TWODICE_INLINE void ask(size_t begin, size_t end) const {  // in 64 lanes; a loop out of line would be no effect to GCC
        for (size_t at = begin * step; at < end * step; at += 64) __builtin_prefetch(from + at);
    }
};

constexpr size_t kLowGroup = 64;   // lanes that have one bit of the answer
constexpr size_t kLowGroups = 32;  // of a run, at most

#if TWODICE_X86
TWODICE_AVX2 inline uint32_t low_avx2(const Run& run, uint32_t c0, size_t groups, const uint16_t* limits, uint16_t* out,
                                      Ahead ahead) {
    KeysAvx2 keys;
    spread_keys(run, keys);
    uint32_t found = 0;
    for (size_t i = 0; i < groups; ++i) {
        ahead.ask(i, i + 1);
        __m256i ab[2], cd[2];
        words_avx2<2>(run, keys, c0 + 8u * static_cast<uint32_t>(i), ab, cd);
        // By the least of four; the set has no unsigned comparison of lanes.
        const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(limits[i / 2]));
        const __m256i least = _mm256_min_epu16(_mm256_min_epu16(ab[0], cd[0]), _mm256_min_epu16(ab[1], cd[1]));
        const __m256i low = _mm256_cmpeq_epi16(_mm256_min_epu16(least, limit), least);
        if (_mm256_testz_si256(low, low)) continue;
        for (int g = 0; g < 2; ++g) store_lanes(ab[g], cd[g], out + kLowGroup * i + 32 * g);
        found |= uint32_t{1} << i;
    }
    return found;
}

// Groups from `begin` on.
template <int Groups>
TWODICE_AVX512 TWODICE_INLINE uint32_t low_avx512(const Run& run, const KeysAvx512& keys, uint32_t c0, size_t begin,
                                                  const uint16_t* limits, uint16_t* out) {
    __m512i ab[Groups], cd[Groups];
    words_avx512<Groups>(run, keys, c0 + 8u * static_cast<uint32_t>(begin), ab, cd);
    __mmask32 low[Groups], any = 0;
    for (int g = 0; g < Groups; ++g) {
        const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(limits[(begin + g) / 2]));
        low[g] = _mm512_cmple_epu16_mask(ab[g], limit) | _mm512_cmple_epu16_mask(cd[g], limit);
        any |= low[g];
    }
    if (__builtin_expect(any == 0, 1)) return 0;
    uint32_t found = 0;
    for (int g = 0; g < Groups; ++g) {  // no branch that nobody can predict
        store_lanes(ab[g], cd[g], out + kLowGroup * (begin + g));
        found |= uint32_t{low[g] != 0} << (begin + g);
    }
    return found;
}

TWODICE_AVX512 inline uint32_t low_avx512(const Run& run, uint32_t c0, size_t groups, const uint16_t* limits,
                                          uint16_t* out, Ahead ahead) {
    KeysAvx512 keys;
    spread_keys(run, keys);
    uint32_t found = 0;
    size_t i = 0;
    for (; i + 4 <= groups; i += 4) {
        ahead.ask(i, i + 4);
        found |= low_avx512<4>(run, keys, c0, i, limits, out);
    }
    for (; i < groups; ++i) {
        ahead.ask(i, i + 1);
        found |= low_avx512<1>(run, keys, c0, i, limits, out);
    }
    return found;
}
#endif

// As fill_lanes, for at most kLowGroups groups of lanes; but a group must be written only where one of its lanes is at most
// its limit, and two groups have one limit. A bit of the answer says that a group was written and may have such a lane.
inline uint32_t fill_low_lanes(const Run& run, uint32_t c0, size_t counters, [[maybe_unused]] const uint16_t* limits,
                               uint16_t* out, Ahead ahead) {
    const size_t groups = counters / 8, rest = counters % 8;
    uint32_t found = 0;
    switch (simd_level().load(std::memory_order_relaxed)) {
#if TWODICE_X86
        case Simd::avx512: found = low_avx512(run, c0, groups, limits, out, ahead); break;
        case Simd::avx2: found = low_avx2(run, c0, groups, limits, out, ahead); break;
#endif
        default:
            ahead.ask(0, groups);
            fill_lanes(run, c0, 8 * groups, out);
            found = static_cast<uint32_t>((uint64_t{1} << groups) - 1);
    }
    if (rest == 0) return found;
    fill_lanes(run, c0 + 8u * static_cast<uint32_t>(groups), rest, out + kLowGroup * groups);
    return found | uint32_t{1} << groups;
}

}  // namespace twodice
