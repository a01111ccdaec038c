// From a block of scores to weights, and back: the scale, cap, bias, masks, softmax, DropKey and dropout in one go in
// scratch, and the same backwards with the masks rebuilt from their keys. Knows no matrix product and no Python.
//
// Letters: B rows, H query heads, T queries, S keys, W value width.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "half.hpp"
#include "philox.hpp"
#include "threads.hpp"
#include "vector16.hpp"

namespace twodice {
namespace {

// How scores become weights, the same for all rows of a call.
struct Scores {
    float scale, softcap;  // a softcap of 0 is none
    float keep_scale;
    uint16_t drop, drop_keys;
    bool plain;  // nothing but the scale stands between a score and its exponential
};

// One row of scores: the n keys that its query may see by its place, and what each of them meets.
struct Row {
    int64_t n;
    const float* bias;
    const uint8_t* seen;
    const uint16_t *lanes, *key_lanes;
    float sink;
};

#define TARGET
#define INLINE inline
#define ROWS RowsPortable
using V = Vector16Portable;
#include "attention_rows.hpp"
#undef ROWS
#undef TARGET
#undef INLINE
#if TWODICE_X86
#define INLINE TWODICE_INLINE
#define HALF  // instructions for float16
namespace avx2 {
#define TARGET TWODICE_AVX2
#define ROWS RowsAvx2
using V = Vector16Avx2;
#include "attention_rows.hpp"
#undef ROWS
#undef TARGET
}  // namespace avx2
namespace avx512 {
#define TARGET TWODICE_AVX512
#define ROWS RowsAvx512
using V = Vector16Avx512;
#include "attention_rows.hpp"
#undef ROWS
#undef TARGET
}  // namespace avx512
#undef HALF
#undef INLINE
#endif

// What `what` gives for the rows of the instruction set in use.
template <class Do>
inline auto with_level(Do&& what) {
    switch (simd_level().load(std::memory_order_relaxed)) {
#if TWODICE_X86
        case Simd::avx512: return what(avx512::RowsAvx512{});
        case Simd::avx2: return what(avx2::RowsAvx2{});
#endif
        default: return what(RowsPortable{});
    }
}

constexpr int64_t kGrain = 8192;  // elements of scores below which no second thread is worth its waking

// Integers of rows and columns, which may not be given.
struct Given {
    const int64_t* values;
    int64_t down, along;
    int64_t at(int64_t b, int64_t i, int64_t otherwise) const { return values ? values[b * down + i * along] : otherwise; }
};

// Keys whose positions follow one another: `count` of them from `key` on, the first at `position`.
struct Stretch {
    int64_t key, position, count;
};

// Floats in rows, `step` apart.
struct Matrix {
    float* at;
    int64_t step;
    Matrix from(int64_t row) const { return {at + row * step, step}; }
};

// Some queries of a head, and the keys that any of them may see.
struct Span {
    int64_t row, rows, key, keys;
};

// What is given of one call, tensors as addresses. A bias has the strides of row, head and query, 0 where one value serves
// for all, and its keys are contiguous.
struct Meeting {
    int64_t B, H, T, S;
    bool causal;
    int64_t window;  // 0 is none
    const char* bias;
    bool boolean;
    int64_t bias_stride[3];
    const float* sinks;
    float *lse, *delta;
    Given example, position, column;
    const int64_t* step;
};

class Weights {
   public:
    Weights(const Meeting& given, const Scores& how, uint64_t key, uint64_t keys_key) : given_(given), how_(how) {
        run_.set_key(key), keys_run_.set_key(keys_key);
        const int64_t rows = given.column.values && given.column.down ? given.B : 1;
        stretches_.resize(static_cast<size_t>(rows));
        for (int64_t b = 0; b < rows; ++b) {
            std::vector<Stretch>& row = stretches_[static_cast<size_t>(b)];
            for (int64_t s = 0; s < given.S; ++s) {
                const int64_t at = given.column.at(b, s, s);
                if (row.empty() || at != row.back().position + row.back().count) row.push_back({s, at, 0});
                ++row.back().count;
            }
        }
    }

    // What a thread writes to while it works on rows.
    struct Scratch {
        Run run, keys_run;
        std::vector<uint16_t> lanes, key_lanes;
    };
    Scratch scratch() const { return {run_, keys_run_, {}, {}}; }

    // The weights with dropout in place of the scores; writes the log of the sum of exponentials of each row.
    void forward(int64_t b, int64_t h, const Span& at, float* scores, Scratch& scratch, int threads) const {
        each_row(at, scratch, threads, [&](int64_t i, Scratch& own) {
            float* x = scores + i * at.keys;
            const int64_t before = clear(at, at.row + i, x);
            const Row row = row_of(b, h, at, at.row + i, own);
            given_.lse[place(b, h, at.row + i)] =
                with_level([&](auto rows) { return decltype(rows)::forward(row, how_, x + before); });
        });
    }

    // From scores and the gradient of the weights with dropout: those weights, and the gradient of the products of queries
    // and keys, in place; writes delta, the product of each row of the result with its gradient.
    void backward(int64_t b, int64_t h, const Span& at, float* scores, float* grads, Matrix out, Matrix up, int64_t width,
                  Scratch& scratch, int threads) const {
        each_row(at, scratch, threads, [&](int64_t i, Scratch& own) {
            float *x = scores + i * at.keys, *g = grads + i * at.keys;
            const int64_t before = clear(at, at.row + i, x), of_row = place(b, h, at.row + i);
            clear(at, at.row + i, g);
            const Row row = row_of(b, h, at, at.row + i, own);
            given_.delta[of_row] = with_level([&](auto rows) {
                const float delta = decltype(rows)::dot(up.from(i).at, out.from(i).at, width);
                decltype(rows)::backward(row, how_, x + before, g + before, given_.lse[of_row], delta);
                return delta;
            });
        });
    }

    // Some queries and the keys that any of them may see. A window starts at a multiple of 64, so that lanes do.
    Span span(int64_t row, int64_t rows) const {
        const int64_t last = row + rows;
        int64_t low = 0, high = given_.causal ? std::min(given_.S, last) : given_.S;
        if (given_.window) {
            low = std::min(given_.S, std::max<int64_t>(0, row - given_.window + 1) / 64 * 64);
            high = std::max(low, std::min(high, last + given_.window - 1));
        }
        return {row, rows, low, high - low};
    }

   private:
    int64_t place(int64_t b, int64_t h, int64_t t) const { return (b * given_.H + h) * given_.T + t; }

    template <class Do>
    static void each_row(const Span& at, Scratch& scratch, int threads, Do&& one) {
        if (threads <= 1) {
            for (int64_t i = 0; i < at.rows; ++i) one(i, scratch);
            return;
        }
        parallel_for(at.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, at.keys)), threads,
                     [&](int64_t begin, int64_t end) {
                         Scratch own = scratch;
                         for (int64_t i = begin; i < end; ++i) one(i, own);
                     });
    }

    // The keys [low, high) that query t may see by its place.
    void seen(const Span& at, int64_t t, int64_t& low, int64_t& high) const {
        const int64_t end = at.key + at.keys;
        low = at.key, high = end;
        if (given_.causal) high = std::min(high, t + 1);
        if (given_.window > 0) low = std::max(low, t - given_.window + 1), high = std::min(high, t + given_.window);
        low = std::min(low, end), high = std::max(low, high);
    }

    // Makes a row of the block zero where its query may not see; returns how many keys stand before those that it may.
    int64_t clear(const Span& at, int64_t t, float* x) const {
        int64_t low, high;
        seen(at, t, low, high);
        std::memset(x, 0, static_cast<size_t>(low - at.key) * sizeof(float));
        std::memset(x + (high - at.key), 0, static_cast<size_t>(at.key + at.keys - high) * sizeof(float));
        return low - at.key;
    }

    Row row_of(int64_t b, int64_t h, const Span& at, int64_t t, Scratch& scratch) const {
        int64_t low, high;
        seen(at, t, low, high);
        Row row{high - low, nullptr, nullptr, nullptr, nullptr, given_.sinks ? given_.sinks[h] : kMinusInfinity};
        if (given_.bias) {
            const int64_t* stride = given_.bias_stride;
            const int64_t offset = b * stride[0] + h * stride[1] + t * stride[2] + low;
            if (given_.boolean) row.seen = reinterpret_cast<const uint8_t*>(given_.bias) + offset;
            else row.bias = reinterpret_cast<const float*>(given_.bias) + offset;
        }
        if (how_.drop) row.lanes = lanes(scratch.run, scratch.lanes, b, h, t, low, high);
        if (how_.drop_keys) row.key_lanes = lanes(scratch.keys_run, scratch.key_lanes, b, h, t, low, high);
        return row;
    }

    // The lanes of the keys [low, high) of a row. 64 at a time are made, so that none is made one by one.
    const uint16_t* lanes(Run& run, std::vector<uint16_t>& made, int64_t b, int64_t h, int64_t t, int64_t low,
                          int64_t high) const {
        run.set_row(static_cast<uint32_t>(given_.position.at(b, t, t)), static_cast<uint32_t>(given_.example.at(b, t, b)),
                    static_cast<uint32_t>(given_.step[b]));
        const uint32_t head = static_cast<uint32_t>(h) << 20;
        const std::vector<Stretch>& all = stretches_[stretches_.size() == 1 ? 0 : static_cast<size_t>(b)];
        const size_t wanted = static_cast<size_t>(high - low);
        if (made.size() < wanted + 256) made.resize(wanted + 256);
        uint16_t* chosen = made.data();
        for (const Stretch& s : all) {
            const int64_t from = std::max(low, s.key), to = std::min(high, s.key + s.count);
            if (from >= to) continue;
            const int64_t column = s.position + (from - s.key), first = column / 8 * 8, last = column + (to - from);
            const size_t counters = static_cast<size_t>((last - first + 63) / 64 * 8);
            if (all.size() == 1) {
                fill_lanes(run, head | static_cast<uint32_t>(first / 8), counters, made.data());
                return made.data() + (column - first);
            }
            uint16_t some[512];
            for (int64_t at = first; at < last; at += 512) {
                const size_t n = std::min(counters - static_cast<size_t>(at - first) / 8, size_t{64});
                fill_lanes(run, head | static_cast<uint32_t>(at / 8), n, some);
                const int64_t skip = std::max<int64_t>(0, column - at), end = std::min<int64_t>(512, last - at);
                std::memcpy(chosen + (from - low) + (at + skip - column), some + skip,
                            static_cast<size_t>(end - skip) * sizeof(uint16_t));
            }
        }
        return chosen;
    }

    Meeting given_;
    Scores how_;
    Run run_, keys_run_;
    std::vector<std::vector<Stretch>> stretches_;  // of each b, or of all
};

}  // namespace
}  // namespace twodice
