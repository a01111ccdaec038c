// Token sampling: the threads over the rows, the choice of instruction set, the binding. The chain on one row is in the
// files of sampling_level.hpp; the readable twin in src/twodice/kernels/sampling_reference.py.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "blake2b.hpp"
#include "lanes_low.hpp"
#include "noise.hpp"
#include "sampling_types.hpp"
#include "threads.hpp"
#include "vector16.hpp"

namespace nb = nanobind;

namespace twodice {
namespace {

constexpr int64_t kDrawn = 16;   // blocks whose noise is made in one go
constexpr double kDryMost = 1e30;

namespace portable {
#include "sampling_level.hpp"
}

#if TWODICE_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define TWODICE_LEVEL_AVX2 1
namespace avx2 {
#include "sampling_level.hpp"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define TWODICE_LEVEL_AVX512 1
namespace avx512 {
#include "sampling_level.hpp"
}
#undef TWODICE_LEVEL_AVX512
#undef TWODICE_LEVEL_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

int run_row(const Logits& in, const Job& job, Scratch& scratch, int64_t row, Result& out) {
#if TWODICE_X86
    switch (simd_level().load(std::memory_order_relaxed)) {
        case Simd::avx512: return avx512::run_row(in, job, scratch, row, out);
        case Simd::avx2: return avx2::run_row(in, job, scratch, row, out);
        default: break;
    }
#endif
    return portable::run_row(in, job, scratch, row, out);
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// All arrays come as addresses; the caller (kernels/sampling.py) has checked shapes, types and bounds and keeps them
// alive. A bad row has its negative status in the place of a token. Returns the number of bad rows, or with the kept sets
// (bad rows, ids one row behind the other).
nb::object sample(uintptr_t data, int type, int64_t rows, int64_t vocabulary, int64_t row_bytes, int64_t column_stride,
                  nb::tuple settings, int64_t setting_count, uintptr_t keys, int64_t key_count, uintptr_t positions,
                  int64_t position, uintptr_t completions, int64_t completion, nb::tuple past, uintptr_t mask,
                  int64_t mask_stride, uintptr_t state, int need, uintptr_t token, uintptr_t rank, uintptr_t floats,
                  uintptr_t kept_offsets, int threads) {
    const Logits in{at<const char>(data), type, rows, vocabulary, row_bytes, column_stride};
    const Job job{at<const Settings>(nb::cast<uintptr_t>(settings[0])),
                  setting_count == 1,
                  at<const int64_t>(nb::cast<uintptr_t>(settings[1])),
                  at<const double>(nb::cast<uintptr_t>(settings[2])),
                  at<const uint64_t>(keys),
                  key_count == 1,
                  at<const int64_t>(positions),
                  at<const int64_t>(completions),
                  position,
                  completion,
                  at<const int64_t>(nb::cast<uintptr_t>(past[0])),
                  at<const int64_t>(nb::cast<uintptr_t>(past[1])),
                  at<const int64_t>(nb::cast<uintptr_t>(past[2])),
                  at<const uint32_t>(mask),
                  mask_stride,
                  at<double>(state),
                  need};
    int64_t* const tokens = at<int64_t>(token);
    int64_t* const ranks = at<int64_t>(rank);
    double* const numbers = at<double>(floats);
    std::vector<std::vector<int64_t>> kept((need & kNeedKept) ? static_cast<size_t>(rows) : 0);
    std::atomic<int64_t> bad{0};
    std::atomic<bool> failed{false};
    auto body = [&](int64_t begin, int64_t end) {
        thread_local Scratch scratch;
        try {
            for (int64_t row = begin; row < end; ++row) {
                Result out;
                const int found = run_row(in, job, scratch, row, out);
                if (found != kOk) bad.fetch_add(1, std::memory_order_relaxed);
                tokens[row] = found == kOk ? out.token : -found;
                if (need & kNeedRank) ranks[row] = out.rank;
                if (need & ~(kNeedRank | kNeedKept)) {
                    numbers[row] = out.logprob;
                    numbers[rows + row] = out.raw;
                    numbers[2 * rows + row] = out.temperature;
                    numbers[3 * rows + row] = out.mass;
                    numbers[4 * rows + row] = out.entropy;
                    numbers[5 * rows + row] = out.temperature_entropy;
                }
                if (need & kNeedKept) kept[row] = std::move(out.kept);
            }
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    {
        nb::gil_scoped_release release;
        // Below some 10^5 values a second thread costs more than it saves.
        const int64_t grain = std::max<int64_t>(1, 131072 / vocabulary);
        parallel_for(rows, grain, threads, body);
    }
    if (failed) throw std::bad_alloc();
    if (!(need & kNeedKept)) return nb::int_(bad.load());
    int64_t* const offsets = at<int64_t>(kept_offsets);
    offsets[0] = 0;
    for (int64_t row = 0; row < rows; ++row) offsets[row + 1] = offsets[row] + static_cast<int64_t>(kept[row].size());
    nb::object flat = nb::steal(PyByteArray_FromStringAndSize(nullptr, offsets[rows] * 8));
    if (!flat.is_valid()) throw nb::python_error();
    char* to = PyByteArray_AsString(flat.ptr());
    for (const std::vector<int64_t>& one : kept) {
        if (!one.empty()) std::memcpy(to, one.data(), one.size() * 8);
        to += one.size() * 8;
    }
    return nb::make_tuple(bad.load(), flat);
}

// The children, with the name that `told` spells, of the keys whose 64 bits are those of the seeds, which are integers.
void child_keys(nb::tuple seeds, nb::bytes told, uintptr_t out) {
    uint8_t message[kBlakeBlock];
    if (told.size() + 8 > kBlakeBlock) throw nb::value_error("the name of a key is too long");
    std::memcpy(message + 8, told.c_str(), told.size());
    uint64_t* to = at<uint64_t>(out);
    for (const nb::handle seed : seeds) {
        const uint64_t parent = PyLong_AsUnsignedLongLongMask(seed.ptr());
        if (PyErr_Occurred()) throw nb::python_error();
        for (int j = 0; j < 8; ++j) message[j] = static_cast<uint8_t>(parent >> (8 * j));
        *to++ = blake2b_8(message, told.size() + 8);
    }
}

// Whether a history is whole: offsets that rise from 0 to `count`, ids of the vocabulary, prompts no longer than their row
// (prompts may be null). What is wrong, and how to say it, is the business of sampling/sample.py.
bool history_fits(uintptr_t ids, int64_t count, uintptr_t offsets, uintptr_t prompts, int64_t rows, int64_t vocabulary) {
    const int64_t *const id = at<const int64_t>(ids), *const offset = at<const int64_t>(offsets);
    const int64_t* const prompt = at<const int64_t>(prompts);
    // The highest bit is set where a number is negative, or one beyond its bound; unsigned, which may wrap.
    uint64_t wrong = 0;
    auto look = [&](int64_t value, int64_t most) {
        wrong |= static_cast<uint64_t>(value) | (static_cast<uint64_t>(most) - static_cast<uint64_t>(value));
    };
    for (int64_t j = 0; j < count; ++j) look(id[j], vocabulary - 1);
    for (int64_t i = 0; i < rows; ++i) {
        look(offset[i], offset[i + 1]);
        if (prompt) look(prompt[i], offset[i + 1] - offset[i]);
    }
    return wrong >> 63 == 0 && offset[0] == 0 && offset[rows] == count;
}

// ---- the parts of a draw, number by number, for the test that holds them against random/noise.py ---------------------

// The 16 leading bits of the tokens first .. first + count - 1 (first a multiple of 8), by the instructions in force.
void leading16_run(uint32_t first, int64_t count, uint32_t position, uint32_t completion, uint32_t purpose,
                   uint64_t key, uintptr_t out) {
    Run run;
    run.set_key(key);
    run.set_row(position, completion, purpose);
    std::vector<uint16_t> lanes(static_cast<size_t>((count + 7) / 8 * 8));
    fill_lanes(run, first >> 3, lanes.size() / 8, lanes.data());
    std::copy_n(lanes.begin(), count, at<int64_t>(out));
}

// The whole uniforms and their Gumbel noise; places are (rows, 4): id, position, completion, purpose.
void gumbel_draws(uintptr_t places, int64_t rows, uintptr_t keys, uintptr_t uniforms, uintptr_t noise) {
    const int64_t* place = at<const int64_t>(places);
    for (int64_t i = 0; i < rows; ++i, place += 4) {
        const uint32_t id = static_cast<uint32_t>(place[0]);
        const Place where{at<const uint64_t>(keys)[i], static_cast<uint32_t>(place[1]), static_cast<uint32_t>(place[2]),
                          static_cast<uint32_t>(place[3])};
        at<uint64_t>(uniforms)[i] = uniform64(where, id, leading16(where, id));
        at<double>(noise)[i] = gumbel(where, id);
    }
}

void gumbel_of_bits(uintptr_t uniforms, int64_t count, uintptr_t out) {
    for (int64_t i = 0; i < count; ++i) at<double>(out)[i] = gumbel_from_bits(at<const uint64_t>(uniforms)[i]);
}

// Fixed-point masses of z <= 0, by the instructions in force.
void weights_of(uintptr_t z, int64_t count, uintptr_t out) {
    const double* const values = at<const double>(z);
    int64_t* const found = at<int64_t>(out);
#if TWODICE_X86
    switch (simd_level().load(std::memory_order_relaxed)) {
        case Simd::avx512: return avx512::weigh(values, count, 0.0, 1.0, found);
        case Simd::avx2: return avx2::weigh(values, count, 0.0, 1.0, found);
        default: break;
    }
#endif
    portable::weigh(values, count, 0.0, 1.0, found);
}

}  // namespace
}  // namespace twodice

void bind_sampling(nb::module_& m) {
    m.def("sample", &twodice::sample);
    m.def("child_keys", &twodice::child_keys);
    m.def("history_fits", &twodice::history_fits);
    m.def("leading16_run", &twodice::leading16_run);
    m.def("gumbel_draws", &twodice::gumbel_draws);
    m.def("gumbel_of_bits", &twodice::gumbel_of_bits);
    m.def("weights_of", &twodice::weights_of);
}
