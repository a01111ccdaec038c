// Attention between its matrix products: on a block of scores in scratch, the scale, cap, bias, masks, softmax, DropKey
// and dropout in one go, and the same backwards with the masks rebuilt from their keys. The readable twin is
// src/twodice/kernels/attention_reference.py. Takes raw addresses; knows no torch and does no matrix product.
//
// Letters: B rows, H query heads, T queries, S keys, W value width.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>
#include <utility>
#include <vector>

#include "philox.hpp"
#include "threads.hpp"
#include "vector16.hpp"

namespace nb = nanobind;

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
#undef INLINE
#endif

using Two = std::tuple<int64_t, int64_t>;
using Three = std::tuple<int64_t, int64_t, int64_t>;
using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;

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

// A block of scores, (rows of one batch of products) x (queries) x (keys), contiguous, and where it stands: entry i of the
// batch is (b, h) = divmod(first + i * step, H).
struct Block {
    float* scores;
    float* grads;
    int64_t count, rows, keys, first, step, first_row, first_key;
    const float *up, *out;
    int64_t up_stride[2], out_stride[2], width;
};

class Attention {
   public:
    Attention(Four shape, float scale, float softcap, bool causal, int64_t window, uintptr_t bias, bool boolean,
              Three bias_stride, uintptr_t sinks, uintptr_t lse, uintptr_t delta, uintptr_t example, Two example_stride,
              uintptr_t position, Two position_stride, uintptr_t column, Two column_stride, uintptr_t step,
              uint64_t key, int threshold, uint64_t keys_key, int key_threshold, int threads)
        : causal_(causal),
          boolean_(boolean),
          window_(window),
          bias_(bias),
          sinks_(reinterpret_cast<const float*>(sinks)),
          lse_(reinterpret_cast<float*>(lse)),
          delta_(reinterpret_cast<float*>(delta)),
          example_{reinterpret_cast<const int64_t*>(example), std::get<0>(example_stride), std::get<1>(example_stride)},
          position_{reinterpret_cast<const int64_t*>(position), std::get<0>(position_stride),
                    std::get<1>(position_stride)},
          step_(reinterpret_cast<const int64_t*>(step)),
          threads_(threads) {
        std::tie(B_, H_, T_, S_) = shape;
        std::tie(bias_stride_[0], bias_stride_[1], bias_stride_[2]) = bias_stride;
        how_.scale = scale, how_.softcap = softcap;
        how_.drop = static_cast<uint16_t>(threshold), how_.drop_keys = static_cast<uint16_t>(key_threshold);
        how_.keep_scale = static_cast<float>(65536.0 / (65536 - threshold));
        how_.plain = scale > 0.0f && softcap == 0.0f && !bias && !key_threshold;
        run_.set_key(key), keys_run_.set_key(keys_key);
        const Given columns{reinterpret_cast<const int64_t*>(column), std::get<0>(column_stride),
                            std::get<1>(column_stride)};
        const int64_t rows = columns.values && columns.down ? B_ : 1;
        stretches_.resize(static_cast<size_t>(rows));
        for (int64_t b = 0; b < rows; ++b) {
            std::vector<Stretch>& row = stretches_[static_cast<size_t>(b)];
            for (int64_t s = 0; s < S_; ++s) {
                const int64_t at = columns.at(b, s, s);
                if (row.empty() || at != row.back().position + row.back().count) row.push_back({s, at, 0});
                ++row.back().count;
            }
        }
    }

    // The weights with dropout in place of the scores; writes the log of the sum of exponentials of each row.
    void forward(uintptr_t scores, Three size, Four place) const {
        Block at{};
        at.scores = reinterpret_cast<float*>(scores);
        set(at, size, place);
        each_row(at, false);
    }

    // From scores and the gradient of the weights with dropout: those weights, and the gradient of the products of queries
    // and keys, in place; writes delta, the product of each row of the result with its gradient.
    void backward(uintptr_t scores, uintptr_t grads, Three size, Four place, uintptr_t up, Two up_stride, uintptr_t out,
                  Two out_stride, int64_t width) const {
        Block at{};
        at.scores = reinterpret_cast<float*>(scores), at.grads = reinterpret_cast<float*>(grads);
        at.up = reinterpret_cast<const float*>(up), at.out = reinterpret_cast<const float*>(out);
        std::tie(at.up_stride[0], at.up_stride[1]) = up_stride;
        std::tie(at.out_stride[0], at.out_stride[1]) = out_stride;
        at.width = width;
        set(at, size, place);
        each_row(at, true);
    }

   private:
    static void set(Block& at, const Three& size, const Four& place) {
        std::tie(at.count, at.rows, at.keys) = size;
        std::tie(at.first, at.step, at.first_row, at.first_key) = place;
    }

    void each_row(Block& at, bool backward) const {
        nb::gil_scoped_release release;
        const int64_t rows = at.count * at.rows, grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, at.keys));
        const auto some = [&](int64_t begin, int64_t end) {
            Scratch scratch;
            scratch.run = run_, scratch.keys_run = keys_run_;
            for (int64_t i = begin; i < end; ++i) one(at, i, backward, scratch);
        };
        parallel_for(rows, grain, threads_, some);
    }

    struct Scratch {
        Run run, keys_run;
        std::vector<uint16_t> lanes, key_lanes;
    };

    void one(const Block& at, int64_t index, bool backward, Scratch& scratch) const {
        const int64_t entry = at.first + index / at.rows * at.step, b = entry / H_, h = entry % H_;
        const int64_t in_block = index % at.rows, t = at.first_row + in_block, end = at.first_key + at.keys;
        int64_t low = at.first_key, high = end;
        if (causal_) high = std::min(high, t + 1);
        if (window_ > 0) low = std::max(low, t - window_ + 1), high = std::min(high, t + window_);
        low = std::min(low, end), high = std::max(low, high);
        const int64_t before = low - at.first_key, after = end - high;
        float* x = at.scores + index * at.keys;
        float* g = at.grads ? at.grads + index * at.keys : nullptr;
        const auto clear = [&](float* from) {
            std::memset(from, 0, static_cast<size_t>(before) * sizeof(float));
            std::memset(from + at.keys - after, 0, static_cast<size_t>(after) * sizeof(float));
        };
        clear(x);
        if (g) clear(g);
        Row row{high - low, nullptr, nullptr, nullptr, nullptr, sinks_ ? sinks_[h] : kMinusInfinity};
        if (bias_) {
            const int64_t offset = b * bias_stride_[0] + h * bias_stride_[1] + t * bias_stride_[2] + low;
            if (boolean_) row.seen = reinterpret_cast<const uint8_t*>(bias_) + offset;
            else row.bias = reinterpret_cast<const float*>(bias_) + offset;
        }
        if (how_.drop) row.lanes = lanes(scratch.run, scratch.lanes, b, h, t, low, high);
        if (how_.drop_keys) row.key_lanes = lanes(scratch.keys_run, scratch.key_lanes, b, h, t, low, high);
        const int64_t of_row = (b * H_ + h) * T_ + t;
        if (!backward) {
            lse_[of_row] = with_level([&](auto rows) { return decltype(rows)::forward(row, how_, x + before); });
            return;
        }
        const int64_t n = index / at.rows;
        const float* up = at.up + n * at.up_stride[0] + in_block * at.up_stride[1];
        const float* out = at.out + n * at.out_stride[0] + in_block * at.out_stride[1];
        delta_[of_row] = with_level([&](auto rows) {
            const float delta = decltype(rows)::dot(up, out, at.width);
            decltype(rows)::backward(row, how_, x + before, g + before, lse_[of_row], delta);
            return delta;
        });
    }

    template <class Do>
    static float with_level(Do&& what) {
        switch (simd_level().load(std::memory_order_relaxed)) {
#if TWODICE_X86
            case Simd::avx512: return what(avx512::RowsAvx512{});
            case Simd::avx2: return what(avx2::RowsAvx2{});
#endif
            default: return what(RowsPortable{});
        }
    }

    // The lanes of the keys [low, high) of a row. 64 at a time are made, so that none is made one by one.
    const uint16_t* lanes(Run& run, std::vector<uint16_t>& made, int64_t b, int64_t h, int64_t t, int64_t low,
                          int64_t high) const {
        run.set_row(static_cast<uint32_t>(position_.at(b, t, t)), static_cast<uint32_t>(example_.at(b, t, b)),
                    static_cast<uint32_t>(step_[b]));
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

    int64_t B_, H_, T_, S_;
    bool causal_, boolean_;
    int64_t window_;
    uintptr_t bias_;
    int64_t bias_stride_[3];
    const float* sinks_;
    float *lse_, *delta_;
    Given example_, position_;
    const int64_t* step_;
    int threads_;
    Scores how_{};
    Run run_, keys_run_;
    std::vector<std::vector<Stretch>> stretches_;  // of each b, or of all
};

}  // namespace
}  // namespace twodice

void bind_attention(nb::module_& m) {
    using namespace twodice;
    using A = Attention;
    nb::class_<A>(m, "Attention")
        .def(nb::init<Four, float, float, bool, int64_t, uintptr_t, bool, Three, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                      Two, uintptr_t, Two, uintptr_t, Two, uintptr_t, uint64_t, int, uint64_t, int, int>())
        .def("forward", &A::forward)
        .def("backward", &A::backward);
}
