// Dropout of rows: decisions from Philox, selection and scale in one pass over memory, for each instruction set. The
// readable twin is src/twodice/kernels/dropout_reference.py, which gives the same bits. Knows no Python and no threads.
//
// Letters: B rows, H heads, T positions, C columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "half.hpp"
#include "philox.hpp"

namespace twodice {
namespace {

// ---- what a call is --------------------------------------------------------------------------------------------------

struct Rate {
    uint16_t threshold;  // in [0, 65535]; 65536 (all dropped) never comes here
    float scale;
    double scale_double;
};
inline float scale_for(const Rate& rate, float) { return rate.scale; }
inline double scale_for(const Rate& rate, double) { return rate.scale_double; }

struct Call {
    const char *x, *residual;
    char* y;
    int64_t B, H, T, C;
    int64_t x_stride[4], y_stride[4], residual_stride[4];  // in elements, for B, H, T, C
    const int64_t *example, *position, *column;            // null: 0 .. B-1, 0 .. T-1, 0 .. C-1
    int64_t example_stride[2], position_stride[2], column_stride[2];
    bool follow;  // of each row the first column is given, and the others count on from it
    uint32_t step;
    Rate rate;
    bool dense, stream;
    int64_t block, blocks;                            // columns a unit of work has; units a row has
    std::vector<std::pair<int64_t, int64_t>> ranges;  // smallest and largest column of each b, where given
    Run run;
};

constexpr int64_t kBlock = 16384;   // columns; a multiple of 64
constexpr int64_t kStrided = 1024;  // columns gathered at a time where columns are not contiguous

struct Place {
    int64_t b, h, t, first, last;
};

TWODICE_INLINE Place place(const Call& call, int64_t unit) {
    const int64_t row = call.blocks == 1 ? unit : unit / call.blocks;
    const int64_t first = call.blocks == 1 ? 0 : (unit - row * call.blocks) * call.block;
    const int64_t upper = row / call.T;
    return {upper / call.H, upper % call.H, row % call.T, first, std::min(call.C, first + call.block)};
}

TWODICE_INLINE void set_row(const Call& call, const Place& at, Run& run) {
    const int64_t example =
        call.example ? call.example[at.b * call.example_stride[0] + at.t * call.example_stride[1]] : at.b;
    const int64_t position =
        call.position ? call.position[at.b * call.position_stride[0] + at.t * call.position_stride[1]] : at.t;
    run.set_row(static_cast<uint32_t>(position), static_cast<uint32_t>(example), call.step);
}

// The column of the first element, where the columns are consecutive.
TWODICE_INLINE int64_t first_column(const Call& call, const Place& at) {
    return call.follow ? call.column[at.b * call.column_stride[0]] + at.first : at.first;
}

TWODICE_INLINE int64_t offset(const int64_t* stride, const Place& at) {
    return at.b * stride[0] + at.h * stride[1] + at.t * stride[2];
}

// ---- selection, 16 (portable, AVX2, NEON) or 32 (AVX-512) elements at a time -------------------------------------------

struct Portable {
    static constexpr int kStep = 16, kLanes = 64;
    struct Keys {};
    static void spread(const Run&, Keys&) {}
    template <int>
    static void lanes(const Run& run, const Keys&, uint32_t c0, uint16_t* out) {
        lanes64_portable(run, c0, out);
    }
    template <class T, bool Add, bool Stream>
    static void select(const uint16_t* lanes, const T* x, const T* residual, T* y, const Rate& rate) {
        const auto scale = scale_for(rate, widen(T{}));
        for (int i = 0; i < kStep; ++i) {
            T kept;
            narrow(widen(x[i]) * scale, kept);
            if (lanes[i] < rate.threshold) kept = T{};
            if (Add) narrow(widen(residual[i]) + widen(kept), kept);
            y[i] = kept;
        }
    }
    static void fence() {}
};

#if TWODICE_X86
struct Avx2 {
    static constexpr int kStep = 16, kLanes = 64;
    using Keys = KeysAvx2;
    TWODICE_AVX2 TWODICE_INLINE static void spread(const Run& run, Keys& keys) { spread_keys(run, keys); }
    template <int Groups>
    TWODICE_AVX2 TWODICE_INLINE static void lanes(const Run& run, const Keys& keys, uint32_t c0, uint16_t* out) {
        lanes_avx2<Groups>(run, keys, c0, out);
    }
    TWODICE_AVX2 TWODICE_INLINE static __m256i kept(const uint16_t* lanes, const Rate& rate) {
        const __m256i lane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
        const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(rate.threshold));
        return _mm256_cmpeq_epi16(_mm256_max_epu16(lane, threshold), lane);
    }
    template <bool Stream>
    TWODICE_AVX2 TWODICE_INLINE static void put(float* y, __m256 v) {
        if (Stream) _mm256_stream_ps(y, v);
        else _mm256_storeu_ps(y, v);
    }
    template <bool Add, bool Stream>
    TWODICE_AVX2 TWODICE_INLINE static void some(__m256i mask, const float* x, const float* residual, float* y,
                                                 __m256 scale) {
        __m256 v = _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(x), scale), _mm256_castsi256_ps(mask));
        if (Add) v = _mm256_add_ps(_mm256_loadu_ps(residual), v);
        put<Stream>(y, v);
    }
    template <class T, bool Add, bool Stream>
    TWODICE_AVX2 TWODICE_INLINE static std::enable_if_t<std::is_same_v<T, float>> select(
        const uint16_t* lanes, const T* x, const T* residual, T* y, const Rate& rate) {
        const __m256i mask = kept(lanes, rate);
        const __m256 scale = _mm256_set1_ps(rate.scale);
        some<Add, Stream>(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(mask)), x, residual, y, scale);
        some<Add, Stream>(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(mask, 1)), x + 8, residual + 8, y + 8, scale);
    }
    template <class T, bool Add, bool Stream>
    TWODICE_AVX2 TWODICE_INLINE static std::enable_if_t<std::is_same_v<T, double>> select(
        const uint16_t* lanes, const T* x, const T* residual, T* y, const Rate& rate) {
        alignas(32) int16_t mask[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(mask), kept(lanes, rate));
        const __m256d scale = _mm256_set1_pd(rate.scale_double);
        for (int i = 0; i < 16; i += 4) {
            const __m256i wide = _mm256_cvtepi16_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + i)));
            __m256d v = _mm256_and_pd(_mm256_mul_pd(_mm256_loadu_pd(x + i), scale), _mm256_castsi256_pd(wide));
            if (Add) v = _mm256_add_pd(_mm256_loadu_pd(residual + i), v);
            _mm256_storeu_pd(y + i, v);
        }
    }
    TWODICE_AVX2 TWODICE_INLINE static __m256 widen8(__m128i v, Bf16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
    TWODICE_AVX2 TWODICE_INLINE static __m256 widen8(__m128i v, F16) { return _mm256_cvtph_ps(v); }
    TWODICE_AVX2 TWODICE_INLINE static __m256i round_bf16(__m256 v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC00000), nan), 16);
    }
    TWODICE_AVX2 TWODICE_INLINE static __m256i narrow16(__m256 low, __m256 high, Bf16) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(low), round_bf16(high)), 0xD8);
    }
    TWODICE_AVX2 TWODICE_INLINE static __m256i narrow16(__m256 low, __m256 high, F16) {
        return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    template <class T, bool Add, bool Stream>
    TWODICE_AVX2 TWODICE_INLINE static std::enable_if_t<sizeof(T) == 2> select(const uint16_t* lanes, const T* x,
                                                                               const T* residual, T* y,
                                                                               const Rate& rate) {
        const __m256 scale = _mm256_set1_ps(rate.scale);
        const __m256i in = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        const __m256 low = _mm256_mul_ps(widen8(_mm256_castsi256_si128(in), T{}), scale);
        const __m256 high = _mm256_mul_ps(widen8(_mm256_extracti128_si256(in, 1), T{}), scale);
        __m256i v = _mm256_and_si256(narrow16(low, high, T{}), kept(lanes, rate));
        if (Add) {
            const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual));
            v = narrow16(
                _mm256_add_ps(widen8(_mm256_castsi256_si128(r), T{}), widen8(_mm256_castsi256_si128(v), T{})),
                _mm256_add_ps(widen8(_mm256_extracti128_si256(r, 1), T{}), widen8(_mm256_extracti128_si256(v, 1), T{})),
                T{});
        }
        if (Stream) _mm256_stream_si256(reinterpret_cast<__m256i*>(y), v);
        else _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), v);
    }
    static void fence() { _mm_sfence(); }
};

struct Avx512 {
    static constexpr int kStep = 32, kLanes = 256;  // 256: four chains side by side, since one waits for its products
    using Keys = KeysAvx512;
    TWODICE_AVX512 TWODICE_INLINE static void spread(const Run& run, Keys& keys) { spread_keys(run, keys); }
    template <int Groups>
    TWODICE_AVX512 TWODICE_INLINE static void lanes(const Run& run, const Keys& keys, uint32_t c0, uint16_t* out) {
        lanes_avx512<(Groups + 1) / 2>(run, keys, c0, out);
    }
    TWODICE_AVX512 TWODICE_INLINE static __mmask32 kept(const uint16_t* lanes, const Rate& rate) {
        return _mm512_cmpge_epu16_mask(_mm512_loadu_si512(lanes),
                                       _mm512_set1_epi16(static_cast<int16_t>(rate.threshold)));
    }
    template <class T, bool Add, bool Stream>
    TWODICE_AVX512 TWODICE_INLINE static std::enable_if_t<std::is_same_v<T, float>> select(
        const uint16_t* lanes, const T* x, const T* residual, T* y, const Rate& rate) {
        const __mmask32 mask = kept(lanes, rate);
        const __m512 scale = _mm512_set1_ps(rate.scale);
        for (int i = 0; i < 32; i += 16) {
            __m512 v = _mm512_maskz_mul_ps(static_cast<__mmask16>(mask >> i), _mm512_loadu_ps(x + i), scale);
            if (Add) v = _mm512_add_ps(_mm512_loadu_ps(residual + i), v);
            if (Stream) _mm512_stream_ps(y + i, v);
            else _mm512_storeu_ps(y + i, v);
        }
    }
    template <class T, bool Add, bool Stream>
    TWODICE_AVX512 TWODICE_INLINE static std::enable_if_t<std::is_same_v<T, double>> select(
        const uint16_t* lanes, const T* x, const T* residual, T* y, const Rate& rate) {
        const __mmask32 mask = kept(lanes, rate);
        const __m512d scale = _mm512_set1_pd(rate.scale_double);
        for (int i = 0; i < 32; i += 8) {
            __m512d v = _mm512_maskz_mul_pd(static_cast<__mmask8>(mask >> i), _mm512_loadu_pd(x + i), scale);
            if (Add) v = _mm512_add_pd(_mm512_loadu_pd(residual + i), v);
            _mm512_storeu_pd(y + i, v);
        }
    }
    TWODICE_AVX512 TWODICE_INLINE static __m512 widen16(__m256i v, Bf16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    }
    TWODICE_AVX512 TWODICE_INLINE static __m512 widen16(__m256i v, F16) { return _mm512_cvtph_ps(v); }
    TWODICE_AVX512 TWODICE_INLINE static __m256i narrow16(__m512 v, Bf16) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i chosen = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
    }
    TWODICE_AVX512 TWODICE_INLINE static __m256i narrow16(__m512 v, F16) {
        return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    template <class T, bool Add, bool Stream>
    TWODICE_AVX512 TWODICE_INLINE static std::enable_if_t<sizeof(T) == 2> select(const uint16_t* lanes, const T* x,
                                                                                 const T* residual, T* y,
                                                                                 const Rate& rate) {
        const __mmask32 mask = kept(lanes, rate);
        const __m512 scale = _mm512_set1_ps(rate.scale);
        for (int i = 0; i < 32; i += 16) {
            const __m256i in = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
            __m256i v = narrow16(_mm512_mul_ps(widen16(in, T{}), scale), T{});
            v = _mm256_maskz_mov_epi16(static_cast<__mmask16>(mask >> i), v);
            if (Add) {
                const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual + i));
                v = narrow16(_mm512_add_ps(widen16(r, T{}), widen16(v, T{})), T{});
            }
            if (Stream) _mm256_stream_si256(reinterpret_cast<__m256i*>(y + i), v);
            else _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), v);
        }
    }
    static void fence() { _mm_sfence(); }
};
#endif

#if TWODICE_NEON
struct Neon {
    static constexpr int kStep = 16, kLanes = 64;
    struct Keys {};  // those of the run, spread as they are used: there are not registers enough to hold them
    TWODICE_INLINE static void spread(const Run&, Keys&) {}
    template <int Groups>
    TWODICE_INLINE static void lanes(const Run& run, const Keys&, uint32_t c0, uint16_t* out) {
        lanes_neon<Groups>(run, c0, out);
    }
    // All ones where kept, for 8 elements.
    TWODICE_INLINE static int16x8_t kept(const uint16_t* lanes, const Rate& rate) {
        return vreinterpretq_s16_u16(vcgeq_u16(vld1q_u16(lanes), vdupq_n_u16(rate.threshold)));
    }
    template <bool Add>
    TWODICE_INLINE static void some(int32x4_t mask, const float* x, const float* residual, float* y, float scale) {
        const uint32x4_t scaled = vreinterpretq_u32_f32(vmulq_n_f32(vld1q_f32(x), scale));
        float32x4_t v = vreinterpretq_f32_u32(vandq_u32(scaled, vreinterpretq_u32_s32(mask)));
        if (Add) v = vaddq_f32(vld1q_f32(residual), v);
        vst1q_f32(y, v);
    }
    template <bool Add>
    TWODICE_INLINE static void some(int64x2_t mask, const double* x, const double* residual, double* y, double scale) {
        const uint64x2_t scaled = vreinterpretq_u64_f64(vmulq_n_f64(vld1q_f64(x), scale));
        float64x2_t v = vreinterpretq_f64_u64(vandq_u64(scaled, vreinterpretq_u64_s64(mask)));
        if (Add) v = vaddq_f64(vld1q_f64(residual), v);
        vst1q_f64(y, v);
    }
    TWODICE_INLINE static float32x4_t widen4(uint16x4_t v, Bf16) {
        return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
    }
    TWODICE_INLINE static float32x4_t widen4(uint16x4_t v, F16) { return vcvt_f32_f16(vreinterpret_f16_u16(v)); }
    TWODICE_INLINE static uint16x4_t narrow4(float32x4_t v, Bf16) {
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, vdupq_n_u32(0x7FC00000)), 16);
    }
    TWODICE_INLINE static uint16x4_t narrow4(float32x4_t v, F16) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
    template <bool Add, class T>
    TWODICE_INLINE static void some(int16x4_t mask, const T* x, const T* residual, T* y, float scale) {
        const uint16x4_t in = vld1_u16(&x->bits);
        uint16x4_t v = narrow4(vmulq_n_f32(widen4(in, T{}), scale), T{});
        v = vand_u16(v, vreinterpret_u16_s16(mask));
        if (Add) v = narrow4(vaddq_f32(widen4(vld1_u16(&residual->bits), T{}), widen4(v, T{})), T{});
        vst1_u16(&y->bits, v);
    }
    // Stores that pass the caches are left to the processor: Arm's stop fetching lines that are written whole.
    template <class T, bool Add, bool Stream>
    TWODICE_INLINE static void select(const uint16_t* lanes, const T* x, const T* residual, T* y, const Rate& rate) {
        const auto scale = scale_for(rate, widen(T{}));
        for (int i = 0; i < kStep; i += 8) {
            const int16x8_t mask = kept(lanes + i, rate);
            const int16x4_t half[2] = {vget_low_s16(mask), vget_high_s16(mask)};
            for (int h = 0; h < 2; ++h) {
                const int j = i + 4 * h;
                if constexpr (sizeof(T) == 2) {
                    some<Add>(half[h], x + j, residual + j, y + j, scale);
                } else if constexpr (sizeof(T) == 4) {
                    some<Add>(vmovl_s16(half[h]), x + j, residual + j, y + j, scale);
                } else {
                    const int32x4_t wide = vmovl_s16(half[h]);
                    some<Add>(vmovl_s32(vget_low_s32(wide)), x + j, residual + j, y + j, scale);
                    some<Add>(vmovl_high_s32(wide), x + j + 2, residual + j + 2, y + j + 2, scale);
                }
            }
        }
    }
    static void fence() {}
};
#endif

// ---- rows --------------------------------------------------------------------------------------------------------------

// The three loops below are the same text for each instruction set; only a macro can give a function its target.
#define TWODICE_LOOPS(Isa, TARGET, INLINE)                                                                             \
    /* The last elements, fewer than a step, by way of small buffers. */                                               \
    template <class T, bool Add>                                                                                       \
    TARGET void rest_##Isa(const uint16_t* lanes, const T* x, const T* residual, T* y, int64_t n, const Rate& rate) {  \
        T xs[Isa::kStep] = {}, rs[Isa::kStep] = {}, ys[Isa::kStep];                                                    \
        uint16_t ls[Isa::kStep] = {};                                                                                  \
        std::memcpy(ls, lanes, static_cast<size_t>(n) * sizeof(uint16_t));                                             \
        std::memcpy(xs, x, static_cast<size_t>(n) * sizeof(T));                                                        \
        if (Add) std::memcpy(rs, residual, static_cast<size_t>(n) * sizeof(T));                                        \
        Isa::template select<T, Add, false>(ls, xs, rs, ys, rate);                                                     \
        std::memcpy(y, ys, static_cast<size_t>(n) * sizeof(T));                                                        \
    }                                                                                                                  \
    /* n elements whose lanes lie in memory. */                                                                        \
    template <class T, bool Add, bool Stream>                                                                          \
    TARGET INLINE void given_##Isa(const uint16_t* lanes, const T* x, const T* residual, T* y, int64_t n,              \
                                   const Rate& rate) {                                                                 \
        int64_t i = 0;                                                                                                 \
        for (; i + Isa::kStep <= n; i += Isa::kStep)                                                                   \
            Isa::template select<T, Add, Stream>(lanes + i, x + i, residual + i, y + i, rate);                         \
        if (i < n) rest_##Isa<T, Add>(lanes + i, x + i, residual + i, y + i, n - i, rate);                             \
    }                                                                                                                  \
    /* n contiguous elements from counter c0 on: lanes are made 256 or 64 at a time and used at once. */               \
    template <class T, bool Add, bool Stream>                                                                          \
    TARGET INLINE void dense_##Isa(const Run& run, const Isa::Keys& keys, uint32_t c0, const T* x, const T* residual,  \
                                   T* y, int64_t n, const Rate& rate) {                                                \
        alignas(64) uint16_t lanes[Isa::kLanes];                                                                       \
        int64_t i = 0;                                                                                                 \
        if constexpr (Isa::kLanes > 64) {                                                                              \
            for (; i + Isa::kLanes <= n; i += Isa::kLanes, c0 += Isa::kLanes / 8) {                                    \
                Isa::template lanes<Isa::kLanes / 32>(run, keys, c0, lanes);                                           \
                for (int j = 0; j < Isa::kLanes; j += Isa::kStep)                                                      \
                    Isa::template select<T, Add, Stream>(lanes + j, x + i + j, residual + i + j, y + i + j, rate);     \
            }                                                                                                          \
        }                                                                                                              \
        for (; i + 64 <= n; i += 64, c0 += 8) {                                                                        \
            Isa::template lanes<2>(run, keys, c0, lanes);                                                              \
            for (int j = 0; j < 64; j += Isa::kStep)                                                                   \
                Isa::template select<T, Add, Stream>(lanes + j, x + i + j, residual + i + j, y + i + j, rate);         \
        }                                                                                                              \
        if (i < n) {                                                                                                   \
            if (n - i > 32) Isa::template lanes<2>(run, keys, c0, lanes);                                              \
            else Isa::template lanes<1>(run, keys, c0, lanes);                                                         \
            given_##Isa<T, Add, false>(lanes, x + i, residual + i, y + i, n - i, rate);                                \
        }                                                                                                              \
    }                                                                                                                  \
    template <class T, bool Add>                                                                                       \
    TARGET void units_##Isa(const Call& call, int64_t begin, int64_t end) {                                            \
        const T* xs = reinterpret_cast<const T*>(call.x);                                                              \
        const T* rs = reinterpret_cast<const T*>(call.residual);                                                       \
        T* ys = reinterpret_cast<T*>(call.y);                                                                          \
        Run run = call.run;                                                                                            \
        Isa::Keys keys;                                                                                                \
        Isa::spread(run, keys);                                                                                        \
        std::vector<uint16_t> lanes, chosen;                                                                           \
        for (int64_t unit = begin; unit < end; ++unit) {                                                               \
            const Place at = place(call, unit);                                                                        \
            set_row(call, at, run);                                                                                    \
            const uint32_t head = static_cast<uint32_t>(at.h) << 20;                                                   \
            const T* x = xs + offset(call.x_stride, at);                                                               \
            const T* r = Add ? rs + offset(call.residual_stride, at) : x;                                              \
            T* y = ys + offset(call.y_stride, at);                                                                     \
            const int64_t start = first_column(call, at);                                                              \
            if (call.dense && (!call.column || call.follow) && start % 8 == 0) {                                       \
                const uint32_t c0 = head | static_cast<uint32_t>(start / 8);                                           \
                const int64_t n = at.last - at.first;                                                                  \
                x += at.first, r += at.first, y += at.first;                                                           \
                if (call.stream && reinterpret_cast<uintptr_t>(y) % 64 == 0)                                           \
                    dense_##Isa<T, Add, true>(run, keys, c0, x, r, y, n, call.rate);                                   \
                else                                                                                                   \
                    dense_##Isa<T, Add, false>(run, keys, c0, x, r, y, n, call.rate);                                  \
                continue;                                                                                              \
            }                                                                                                          \
            const uint16_t* row = row_lanes(call, at, run, head, lanes, chosen);                                       \
            if (call.dense) {                                                                                          \
                const int64_t i = at.first;                                                                            \
                given_##Isa<T, Add, false>(row, x + i, r + i, y + i, at.last - i, call.rate);                          \
                continue;                                                                                              \
            }                                                                                                          \
            T xb[kStrided], rb[kStrided], yb[kStrided];                                                                \
            for (int64_t i = at.first; i < at.last; i += kStrided) {                                                   \
                const int64_t n = std::min(kStrided, at.last - i);                                                     \
                for (int64_t j = 0; j < n; ++j) xb[j] = x[(i + j) * call.x_stride[3]];                                 \
                if (Add)                                                                                               \
                    for (int64_t j = 0; j < n; ++j) rb[j] = r[(i + j) * call.residual_stride[3]];                      \
                given_##Isa<T, Add, false>(row + (i - at.first), xb, rb, yb, n, call.rate);                            \
                for (int64_t j = 0; j < n; ++j) y[(i + j) * call.y_stride[3]] = yb[j];                                 \
            }                                                                                                          \
        }                                                                                                              \
        if (call.stream) Isa::fence();                                                                                 \
    }                                                                                                                  \
    void all_##Isa(const Call& call, int code, int64_t begin, int64_t end) {                                           \
        const bool add = call.residual != nullptr;                                                                     \
        switch (code) {                                                                                                \
            case 0: add ? units_##Isa<float, true>(call, begin, end) : units_##Isa<float, false>(call, begin, end);    \
                break;                                                                                                 \
            case 1: add ? units_##Isa<double, true>(call, begin, end) : units_##Isa<double, false>(call, begin, end);  \
                break;                                                                                                 \
            case 2: add ? units_##Isa<Bf16, true>(call, begin, end) : units_##Isa<Bf16, false>(call, begin, end);      \
                break;                                                                                                 \
            default: add ? units_##Isa<F16, true>(call, begin, end) : units_##Isa<F16, false>(call, begin, end);       \
        }                                                                                                              \
    }

// Lanes of the columns [at.first, at.last), wherever the columns stand; the vectors are scratch that lives for a chunk.
const uint16_t* row_lanes(const Call& call, const Place& at, const Run& run, uint32_t head,
                          std::vector<uint16_t>& lanes, std::vector<uint16_t>& chosen) {
    int64_t low = first_column(call, at), high = low + (at.last - at.first) - 1;
    const bool gathered = call.column && !call.follow;
    if (gathered) std::tie(low, high) = call.ranges[static_cast<size_t>(at.b)];
    const int64_t first = low / 8, counters = high / 8 - first + 1;
    lanes.resize(static_cast<size_t>(counters) * 8);
    fill_lanes(run, head | static_cast<uint32_t>(first), static_cast<size_t>(counters), lanes.data());
    if (!gathered) return lanes.data() + (low - first * 8);
    chosen.resize(static_cast<size_t>(at.last - at.first));
    const int64_t* column = call.column + at.b * call.column_stride[0];
    for (int64_t i = at.first; i < at.last; ++i)
        chosen[static_cast<size_t>(i - at.first)] =
            lanes[static_cast<size_t>(column[i * call.column_stride[1]] - first * 8)];
    return chosen.data();
}

TWODICE_LOOPS(Portable, , inline)
#if TWODICE_X86
TWODICE_LOOPS(Avx2, TWODICE_AVX2, TWODICE_INLINE)
TWODICE_LOOPS(Avx512, TWODICE_AVX512, TWODICE_INLINE)
#endif
#if TWODICE_NEON
TWODICE_LOOPS(Neon, , TWODICE_INLINE)
#endif
#undef TWODICE_LOOPS

void all(const Call& call, int code, int64_t begin, int64_t end) {
    switch (simd_level().load(std::memory_order_relaxed)) {
#if TWODICE_X86
        case Simd::avx512: return all_Avx512(call, code, begin, end);
        case Simd::avx2: return all_Avx2(call, code, begin, end);
#endif
#if TWODICE_NEON
        case Simd::neon: return all_Neon(call, code, begin, end);
#endif
        default: return all_Portable(call, code, begin, end);
    }
}

}  // namespace
}  // namespace twodice
