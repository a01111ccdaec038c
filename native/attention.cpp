// Attention on the CPU in blocks. A block is some queries of one head; its scores against all keys that they may see lie
// in scratch, which stays in the cache and is used again for the next block. Forward: scores, weights in their place,
// product with the values. Backward: the same scores, the gradient of the weights, then both turned in place into weights
// with dropout and gradient of scores, and three products. All in float32: other types are converted block by block. The
// products are those of the library whose address is given; what stands between them is in attention_weights.hpp. The
// readable twin is src/twodice/kernels/attention_reference.py. Takes raw addresses; knows no torch.
//
// Letters: B rows, H query heads, N key heads, T queries, S keys, K key width, W value width.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "attention_weights.hpp"

namespace nb = nanobind;

namespace twodice {
namespace {

// `sgemm` of BLAS: c = alpha a b + beta c, all in columns. Its integers have 32 bits or 64; on a little-endian machine
// ours are read rightly as either.
using Sgemm = void (*)(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const float*, const float*,
                       const int64_t*, const float*, const int64_t*, const float*, float*, const int64_t*);

// What a thread has in its own memory: a block of scores and of their gradients, and copies in float32 of other types.
enum Piece { kScores, kGrads, kQuery, kKey, kValue, kOut, kUp, kToQuery, kToKey, kToValue, kPieces };

// Of four dimensions (B, heads, rows, width): the last contiguous, strides in elements of the others.
struct Tensor {
    char* data;
    int64_t stride[3];
    int64_t width;
    Piece copy;
    int64_t offset(int64_t b, int64_t head, int64_t row) const {
        return b * stride[0] + head * stride[1] + row * stride[2];
    }
};

using Two = std::tuple<int64_t, int64_t>;
using Three = std::tuple<int64_t, int64_t, int64_t>;
using Seven = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using Strided = std::tuple<uintptr_t, Three>;
using Integers = std::tuple<uintptr_t, Two>;

Tensor tensor(const Strided& from, int64_t width, Piece copy) {
    Tensor out{reinterpret_cast<char*>(std::get<0>(from)), {}, width, copy};
    std::tie(out.stride[0], out.stride[1], out.stride[2]) = std::get<1>(from);
    return out;
}

Given integers(const Integers& from) {
    const auto& [down, along] = std::get<1>(from);
    return {reinterpret_cast<const int64_t*>(std::get<0>(from)), down, along};
}

class Attention {
   public:
    Attention(uintptr_t sgemm, Seven shape, int bits, bool brain, int64_t rows, float scale, float softcap, bool causal,
              int64_t window, Strided bias, bool boolean, uintptr_t sinks, uintptr_t lse, uintptr_t delta, Integers example,
              Integers position, Integers column, uintptr_t step, uint64_t key, int threshold, uint64_t keys_key,
              int key_threshold, int threads)
        : sgemm_(reinterpret_cast<Sgemm>(sgemm)), wide_(bits == 32), brain_(brain), threads_(threads) {
        std::tie(B_, H_, N_, T_, S_, K_, W_) = shape;
        Meeting given{};
        given.B = B_, given.H = H_, given.T = T_, given.S = S_, given.causal = causal, given.window = window;
        given.bias = reinterpret_cast<const char*>(std::get<0>(bias)), given.boolean = boolean;
        std::tie(given.bias_stride[0], given.bias_stride[1], given.bias_stride[2]) = std::get<1>(bias);
        given.sinks = reinterpret_cast<const float*>(sinks);
        given.lse = reinterpret_cast<float*>(lse), given.delta = reinterpret_cast<float*>(delta);
        given.example = integers(example), given.position = integers(position), given.column = integers(column);
        given.step = reinterpret_cast<const int64_t*>(step);
        Scores how{};
        how.scale = scale, how.softcap = softcap;
        how.drop = static_cast<uint16_t>(threshold), how.drop_keys = static_cast<uint16_t>(key_threshold);
        how.keep_scale = static_cast<float>(65536.0 / (65536 - threshold));
        how.plain = scale > 0.0f && softcap == 0.0f && !given.bias && !key_threshold;
        weights_ = std::make_unique<Weights>(given, how, key, keys_key);
        for (int64_t row = 0; row < T_; row += rows) spans_.push_back(weights_->span(row, std::min(rows, T_ - row)));
        int64_t scores = 0;
        for (const Span& at : spans_) scores = std::max(scores, at.rows * at.keys);
        const int64_t copied = wide_ ? 0 : 1, some = copied * std::min(rows, T_), all = copied * S_;
        sizes_ = {scores, scores, some * K_, all * K_, all * W_, some * W_, some * W_, some * K_, all * K_, all * W_};
    }

    void forward(Strided query, Strided key, Strided value, Strided out) const {
        const Tensor q = tensor(query, K_, kQuery), k = tensor(key, K_, kKey);
        const Tensor v = tensor(value, W_, kValue), o = tensor(out, W_, kOut);
        each_part(threads_, [&](int64_t b, int64_t n, Worker& by) {
            const Matrix keys = read(k, b, n, 0, S_, by), values = read(v, b, n, 0, S_, by);
            for (int64_t h = n * (H_ / N_); h < (n + 1) * (H_ / N_); ++h) {
                for (const Span& at : spans_) {
                    const Matrix scores{by.piece[kScores], at.keys}, rows = read(q, b, h, at.row, at.rows, by);
                    product(at.rows, at.keys, K_, rows, false, keys.from(at.key), true, 0.0f, scores);
                    weights_->forward(b, h, at, scores.at, by.rows, by.threads);
                    const Matrix result = target(o, b, h, at.row, by);
                    product(at.rows, W_, at.keys, scores, false, values.from(at.key), false, 0.0f, result);
                    store(o, b, h, at.row, at.rows, by);
                }
            }
        });
    }

    // Adds to the gradient of the bias, (B, H, T, S) in float32 by strides, 0 where the bias has one value, if there is one.
    void backward(Strided query, Strided key, Strided value, Strided out, Strided grad, Strided to_query, Strided to_key,
                  Strided to_value, Strided to_bias, int64_t to_bias_step) const {
        const Tensor q = tensor(query, K_, kQuery), k = tensor(key, K_, kKey), v = tensor(value, W_, kValue);
        const Tensor o = tensor(out, W_, kOut), up = tensor(grad, W_, kUp), for_q = tensor(to_query, K_, kToQuery);
        const Tensor for_k = tensor(to_key, K_, kToKey), for_v = tensor(to_value, W_, kToValue);
        const Tensor for_bias = tensor(to_bias, to_bias_step, kPieces);
        // Parts share the bias, and a sum must not depend on who comes first.
        each_part(for_bias.data ? 1 : threads_, [&](int64_t b, int64_t n, Worker& by) {
            const Matrix keys = read(k, b, n, 0, S_, by), values = read(v, b, n, 0, S_, by);
            const Matrix sum_k = target(for_k, b, n, 0, by), sum_v = target(for_v, b, n, 0, by);
            bool fresh = true;
            for (int64_t h = n * (H_ / N_); h < (n + 1) * (H_ / N_); ++h) {
                // From the last rows on, so that the first block of a causal pass has all keys.
                for (size_t i = spans_.size(); i-- > 0;) {
                    const Span& at = spans_[i];
                    const Matrix weights{by.piece[kScores], at.keys}, grads{by.piece[kGrads], at.keys};
                    const Matrix rows = read(q, b, h, at.row, at.rows, by), ups = read(up, b, h, at.row, at.rows, by);
                    product(at.rows, at.keys, K_, rows, false, keys.from(at.key), true, 0.0f, weights);
                    product(at.rows, at.keys, W_, ups, false, values.from(at.key), true, 0.0f, grads);
                    weights_->backward(b, h, at, weights.at, grads.at, read(o, b, h, at.row, at.rows, by), ups, W_, by.rows,
                                       by.threads);
                    if (for_bias.data) add(for_bias, b, h, at, grads.at);
                    const Matrix result = target(for_q, b, h, at.row, by);
                    product(at.rows, K_, at.keys, grads, false, keys.from(at.key), false, 0.0f, result);
                    store(for_q, b, h, at.row, at.rows, by);
                    if (fresh && at.keys < S_) clear(sum_k, K_), clear(sum_v, W_), fresh = false;
                    const float beta = fresh ? 0.0f : 1.0f;
                    product(at.keys, W_, at.rows, weights, true, ups, false, beta, sum_v.from(at.key));
                    product(at.keys, K_, at.rows, grads, true, rows, false, beta, sum_k.from(at.key));
                    fresh = false;
                }
            }
            store(for_k, b, n, 0, S_, by), store(for_v, b, n, 0, S_, by);
        });
    }

    // Bytes that each thread works in.
    int64_t scratch() const { return total() * static_cast<int64_t>(sizeof(float)); }

   private:
    // A thread, its memory, and how many threads it may ask to help with the rows of a block.
    struct Worker {
        std::unique_ptr<float[]> held;
        float* piece[kPieces];
        Weights::Scratch rows;
        int threads;
    };

    static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }
    int64_t total() const {
        int64_t floats = 16;
        for (int64_t size : sizes_) floats += padded(size);
        return floats;
    }

    Worker worker(int threads) const {
        Worker by{std::unique_ptr<float[]>(new float[static_cast<size_t>(total())]), {}, weights_->scratch(), threads};
        float* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(by.held.get()) + 63) / 64 * 64);
        for (size_t i = 0; i < kPieces; ++i) by.piece[i] = next, next += padded(sizes_[i]);
        return by;
    }

    // Each head of keys with all its queries, on threads that are lent; without such, products use threads of their own.
    template <class Part>
    void each_part(int threads, Part&& part) const {
        nb::gil_scoped_release release;
        const int64_t parts = B_ * N_, workers = Pool::is_lent() ? std::min<int64_t>(parts, threads) : 1;
        std::atomic<int64_t> next{0};
        parallel_for(workers, 1, threads, [&](int64_t begin, int64_t end) {
            for (; begin < end; ++begin) {
                Worker by = worker(workers == 1 ? threads_ : 1);
                for (int64_t i; (i = next.fetch_add(1)) < parts;) part(i / N_, i % N_, by);
            }
        });
    }

    // c = a b + beta c for c of m rows and n columns, a (m, k) or turned (k, m), b (k, n) or turned (n, k).
    void product(int64_t m, int64_t n, int64_t k, Matrix a, bool a_turned, Matrix b, bool b_turned, float beta,
                 Matrix c) const {
        if (k == 0) {
            for (int64_t i = 0; beta == 0.0f && i < m; ++i) std::fill_n(c.from(i).at, n, 0.0f);
            return;
        }
        if (n == 0 || m == 0) return;
        // What has rows here has columns there, so all is turned: c' = b' a'.
        const float one = 1.0f;
        sgemm_(b_turned ? "T" : "N", a_turned ? "T" : "N", &n, &m, &k, &one, b.at, &b.step, a.at, &a.step, &beta, c.at,
               &c.step);
    }

    void clear(Matrix x, int64_t width) const {
        for (int64_t s = 0; s < S_; ++s) std::fill_n(x.from(s).at, width, 0.0f);
    }

    // Where rows of a head stand in float32, or are written before `store`.
    Matrix target(const Tensor& x, int64_t b, int64_t head, int64_t row, Worker& by) const {
        if (wide_) return {reinterpret_cast<float*>(x.data) + x.offset(b, head, row), x.stride[2]};
        return {by.piece[x.copy], x.width};
    }

    Matrix read(const Tensor& x, int64_t b, int64_t head, int64_t row, int64_t rows, Worker& by) const {
        const Matrix copy = target(x, b, head, row, by);
        each_half(x, b, head, row, rows, [&](auto level, auto* from, int64_t i) {
            decltype(level)::widen_row(from, copy.from(i).at, x.width);
        });
        return copy;
    }

    void store(const Tensor& x, int64_t b, int64_t head, int64_t row, int64_t rows, Worker& by) const {
        const Matrix copy = target(x, b, head, row, by);
        each_half(x, b, head, row, rows, [&](auto level, auto* to, int64_t i) {
            decltype(level)::narrow_row(copy.from(i).at, to, x.width);
        });
    }

    // Nothing in float32.
    template <class Do>
    void each_half(const Tensor& x, int64_t b, int64_t head, int64_t row, int64_t rows, Do&& what) const {
        if (wide_) return;
        with_level([&](auto level) {
            for (int64_t i = 0; i < rows; ++i) {
                char* at = x.data + 2 * x.offset(b, head, row + i);
                if (brain_) what(level, reinterpret_cast<Bf16*>(at), i);
                else what(level, reinterpret_cast<F16*>(at), i);
            }
        });
    }

    static void add(const Tensor& bias, int64_t b, int64_t h, const Span& at, const float* grads) {
        for (int64_t i = 0; i < at.rows; ++i, grads += at.keys) {
            float* into = reinterpret_cast<float*>(bias.data) + bias.offset(b, h, at.row + i);
            if (bias.width) {
                for (int64_t s = 0; s < at.keys; ++s) into[at.key + s] += grads[s];
            } else {
                double sum = 0.0;
                for (int64_t s = 0; s < at.keys; ++s) sum += grads[s];
                *into += static_cast<float>(sum);
            }
        }
    }

    Sgemm sgemm_;
    int64_t B_, H_, N_, T_, S_, K_, W_;
    bool wide_, brain_;  // float32; bfloat16 and not float16
    int threads_;
    std::unique_ptr<Weights> weights_;
    std::vector<Span> spans_;
    std::array<int64_t, kPieces> sizes_{};
};

}  // namespace
}  // namespace twodice

void bind_attention(nb::module_& m) {
    using namespace twodice;
    using A = Attention;
    nb::class_<A>(m, "Attention")
        .def(nb::init<uintptr_t, Seven, int, bool, int64_t, float, float, bool, int64_t, Strided, bool, uintptr_t, uintptr_t,
                      uintptr_t, Integers, Integers, Integers, uintptr_t, uint64_t, int, uint64_t, int, int>())
        .def("forward", &A::forward)
        .def("backward", &A::backward)
        .def("scratch", &A::scratch);
}
