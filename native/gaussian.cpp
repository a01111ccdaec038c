// Gaussian noise: y = x * (1 + s n) with n a standard normal by Box and Muller from Philox words. The readable twins
// are src/twodice/random/gaussian.py and src/twodice/kernels/noise_reference.py, which give the same bits. Takes raw
// addresses; knows no torch.
//
// Letters: B rows, H heads, T positions, C columns.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "noise.hpp"
#include "philox.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace twodice {
namespace {

constexpr double kAngle = 3.141592653589793 * 0x1p-31;
constexpr double kTwo52 = 4503599627370496.0;
constexpr int64_t kTwo52Bits = 0x4330000000000000;  // the bits of 2^52: a 32-bit word in the low ones is added exactly
constexpr double kSin[6] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
                            2.75573137070700676789e-06,  -2.50507602534068634195e-08, 1.58969099521155010221e-10};
constexpr double kCos[6] = {4.16666666666666019037e-02,  -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                            -2.75573143513906633035e-07, 2.08757232129817482790e-09,  -1.13596475577881948265e-11};
constexpr int64_t kChunk = 512;  // counters at a time: their normals stay in the first cache

TWODICE_INLINE double exact(uint32_t word) {
    return bits_of<double>(kTwo52Bits | static_cast<int64_t>(word)) - kTwo52;
}

TWODICE_INLINE double horner(double z, const double* c) {
    return ((((c[5] * z + c[4]) * z + c[3]) * z + c[2]) * z + c[1]) * z + c[0];
}

// noise_log of normal numbers, written so that a loop over it becomes vectors: the shift is logical (the exponent is
// biased to stay positive), and the exponent becomes a double by addition.
TWODICE_INLINE double log_in_loop(double x) {
    const int64_t bits = bits_of<int64_t>(x);
    const uint64_t shifted = static_cast<uint64_t>(bits - int64_t{0x3FE6A09E667F3BCD} + (int64_t{1024} << 52));
    const int64_t k = static_cast<int64_t>(shifted >> 52) - 1024;
    const double m = bits_of<double>(bits - static_cast<int64_t>(static_cast<uint64_t>(k) << 52));
    return log_core(m - 1.0, bits_of<double>(k + kRoundBits) - kRound);
}

// The reciprocal root guessed from the bits, four steps of Newton's, and a product.
TWODICE_INLINE double root(double x) {
    double y = bits_of<double>(int64_t{0x5FE6EB50C7B537A9} - static_cast<int64_t>(bits_of<uint64_t>(x) >> 1));
    const double half = 0.5 * x;
    y = y * (1.5 - (half * y) * y);
    y = y * (1.5 - (half * y) * y);
    y = y * (1.5 - (half * y) * y);
    y = y * (1.5 - (half * y) * y);
    return x * y;
}

// Two words a pair: the radius and the angle of two normals.
TWODICE_INLINE void pairs(const uint32_t* words, double* z, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t around = words[2 * i + 1], quadrant = around >> 30;
        const double u = (exact(words[2 * i]) + 0.5) * 0x1p-32;
        const double radius = root(-2.0 * log_in_loop(u));
        const double phi = ((exact(around & 0x3FFFFFFFu) - 536870912.0) + 0.5) * kAngle;
        const double square = phi * phi;
        const double sine = phi + (phi * square) * horner(square, kSin);
        const double cosine = 1.0 - (0.5 * square - (square * square) * horner(square, kCos));
        // All ones where the quadrant turns the axes, and the sign bits, as integers: no branch in the loop.
        const uint64_t turned = -static_cast<uint64_t>(quadrant & 1);
        const uint64_t s = bits_of<uint64_t>(sine), c = bits_of<uint64_t>(cosine);
        const uint64_t x = (s & turned) | (c & ~turned), y = (c & turned) | (s & ~turned);
        const uint64_t minus_x = static_cast<uint64_t>((quadrant ^ (quadrant >> 1)) & 1) << 63;
        const uint64_t minus_y = static_cast<uint64_t>(quadrant >> 1) << 63;
        z[2 * i] = radius * bits_of<double>(x ^ minus_x);
        z[2 * i + 1] = radius * bits_of<double>(y ^ minus_y);
    }
}

void pairs_portable(const uint32_t* words, double* z, int64_t count) { pairs(words, z, count); }
#if TWODICE_X86
TWODICE_AVX2 void pairs_avx2(const uint32_t* words, double* z, int64_t count) { pairs(words, z, count); }
TWODICE_AVX512 void pairs_avx512(const uint32_t* words, double* z, int64_t count) { pairs(words, z, count); }
#endif

// The normals of `counters` counters from c0 on, four each, at most kChunk of them.
void normals(const Run& run, uint32_t c0, int64_t counters, double* z) {
    alignas(64) uint16_t lanes[8 * kChunk];
    alignas(64) uint32_t words[4 * kChunk];
    fill_lanes(run, c0, static_cast<size_t>(counters), lanes);
    for (int64_t i = 0; i < 4 * counters; ++i)
        words[i] = static_cast<uint32_t>(lanes[2 * i]) | (static_cast<uint32_t>(lanes[2 * i + 1]) << 16);
    switch (simd_level().load(std::memory_order_relaxed)) {
#if TWODICE_X86
        case Simd::avx512: return pairs_avx512(words, z, 2 * counters);
        case Simd::avx2: return pairs_avx2(words, z, 2 * counters);
#endif
        default: return pairs_portable(words, z, 2 * counters);
    }
}

struct Call {
    const char* x;
    char* y;
    int64_t B, H, T, C;
    int64_t x_stride[4], y_stride[4];                      // in elements, for B, H, T, C
    const int64_t *example, *position, *column, *step;     // null: 0 .. B-1, 0 .. T-1, 0 .. C-1; a step is always there
    int64_t example_stride[2], position_stride[2], column_stride[2], step_stride;
    bool follow;  // of each row the first column is given, and the others count on from it
    int64_t block;
    double s;
    Run run;
};

// The multipliers 1 + s n of one row, as the type of the arithmetic; scratch is for the normals.
template <class T>
void multipliers(const Call& call, int64_t b, uint32_t head, const Run& run, std::vector<double>& scratch,
                 std::vector<T>& m) {
    if (call.column) {
        // Columns anywhere: neighbours that read one counter share it.
        const int64_t* column = call.column + b * call.column_stride[0];
        int64_t held = -1;
        double z[4] = {};
        for (int64_t i = 0; i < call.C; ++i) {
            const int64_t at = (call.follow ? column[0] + i : column[i * call.column_stride[1]]) / call.block;
            if (at / 4 != held) {
                held = at / 4;
                normals(run, head | static_cast<uint32_t>(held), 1, z);
            }
            m[static_cast<size_t>(i)] = static_cast<T>(1.0 + call.s * z[at % 4]);
        }
        return;
    }
    const int64_t blocks = (call.C + call.block - 1) / call.block, counters = (blocks + 3) / 4;
    scratch.resize(static_cast<size_t>(std::min(counters, kChunk)) * 4);
    for (int64_t first = 0; first < counters; first += kChunk) {
        const int64_t some = std::min(kChunk, counters - first);
        normals(run, head | static_cast<uint32_t>(first), some, scratch.data());
        const int64_t from = first * 4, to = std::min(blocks, from + some * 4);
        if (call.block == 1) {
            for (int64_t j = from; j < to; ++j)
                m[static_cast<size_t>(j)] = static_cast<T>(1.0 + call.s * scratch[static_cast<size_t>(j - from)]);
        } else {
            for (int64_t j = from; j < to; ++j)
                std::fill(m.begin() + j * call.block, m.begin() + std::min(call.C, (j + 1) * call.block),
                          static_cast<T>(1.0 + call.s * scratch[static_cast<size_t>(j - from)]));
        }
    }
}

template <class T>
void rows(const Call& call, int64_t begin, int64_t end) {
    Run run = call.run;
    std::vector<double> scratch;
    std::vector<T> m(static_cast<size_t>(call.C));
    int64_t held[5] = {-1, -1, -1, -1, -1};  // what the multipliers at hand are of: locked noise makes them once
    for (int64_t row = begin; row < end; ++row) {
        const int64_t t = row % call.T, h = row / call.T % call.H, b = row / (call.T * call.H);
        const int64_t example =
            call.example ? call.example[b * call.example_stride[0] + t * call.example_stride[1]] : b;
        const int64_t position =
            call.position ? call.position[b * call.position_stride[0] + t * call.position_stride[1]] : t;
        const int64_t now[5] = {b, h, example, position, call.step[b * call.step_stride]};
        if (!std::equal(now, now + 5, held)) {
            std::copy(now, now + 5, held);
            run.set_row(static_cast<uint32_t>(position), static_cast<uint32_t>(example),
                        static_cast<uint32_t>(now[4]));
            multipliers(call, b, static_cast<uint32_t>(h) << 20, run, scratch, m);
        }
        const T* x = reinterpret_cast<const T*>(call.x) + b * call.x_stride[0] + h * call.x_stride[1] +
                     t * call.x_stride[2];
        T* y = reinterpret_cast<T*>(call.y) + b * call.y_stride[0] + h * call.y_stride[1] + t * call.y_stride[2];
        if (call.x_stride[3] == 1 && call.y_stride[3] == 1)
            for (int64_t i = 0; i < call.C; ++i) y[i] = x[i] * m[static_cast<size_t>(i)];
        else
            for (int64_t i = 0; i < call.C; ++i)
                y[i * call.y_stride[3]] = x[i * call.x_stride[3]] * m[static_cast<size_t>(i)];
    }
}

bool within(const int64_t* values, const int64_t* stride, int64_t rows, int64_t columns, uint64_t bound) {
    if (!values) return true;
    for (int64_t b = 0; b < (stride[0] ? rows : 1); ++b)
        for (int64_t t = 0; t < (stride[1] ? columns : 1); ++t)
            if (static_cast<uint64_t>(values[b * stride[0] + t * stride[1]]) >= bound) return false;
    return true;
}

using Two = std::tuple<int64_t, int64_t>;
using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;

void copy(const Two& from, int64_t* to) { std::tie(to[0], to[1]) = from; }
void copy(const Four& from, int64_t* to) { std::tie(to[0], to[1], to[2], to[3]) = from; }

// Returns false, and writes nothing, where a coordinate is out of bounds: the caller finds and names it.
bool gaussian(uintptr_t x, uintptr_t y, bool is_double, Four shape, Four x_stride, Four y_stride, uintptr_t example,
              Two example_stride, uintptr_t position, Two position_stride, uintptr_t column, Two column_stride,
              bool follow, uintptr_t step, int64_t step_stride, uint64_t key, double s, int64_t block, int threads) {
    Call call;
    call.x = reinterpret_cast<const char*>(x);
    call.y = reinterpret_cast<char*>(y);
    std::tie(call.B, call.H, call.T, call.C) = shape;
    const int64_t units = call.B * call.H * call.T;
    if (units * call.C == 0) return true;
    copy(x_stride, call.x_stride);
    copy(y_stride, call.y_stride);
    call.example = reinterpret_cast<const int64_t*>(example);
    call.position = reinterpret_cast<const int64_t*>(position);
    call.column = reinterpret_cast<const int64_t*>(column);
    call.step = reinterpret_cast<const int64_t*>(step);
    copy(example_stride, call.example_stride);
    copy(position_stride, call.position_stride);
    copy(column_stride, call.column_stride);
    call.step_stride = step_stride;
    call.follow = call.column && follow;
    constexpr uint64_t kWord = uint64_t{1} << 32;
    const int64_t steps[2] = {step_stride, 0};
    if (!within(call.example, call.example_stride, call.B, call.T, kWord) ||
        !within(call.position, call.position_stride, call.B, call.T, kWord) ||
        !within(call.column, call.column_stride, call.B, call.C,
                (uint64_t{1} << (block == 1 ? 22 : 23)) - static_cast<uint64_t>(follow ? call.C - 1 : 0)) ||
        !within(call.step, steps, call.B, 1, kWord))
        return false;
    call.block = block;
    call.s = s;
    call.run.set_key(key);
    const auto all = [&](int64_t begin, int64_t end) {
        is_double ? rows<double>(call, begin, end) : rows<float>(call, begin, end);
    };
    const int64_t grain = std::max<int64_t>(1, 4096 / call.C);
    nb::gil_scoped_release release;
    parallel_for(units, grain, threads, all);
    return true;
}

}  // namespace
}  // namespace twodice

void bind_gaussian(nb::module_& m) {
    m.def("gaussian", &twodice::gaussian);
}
