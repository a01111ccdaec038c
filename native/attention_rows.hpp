// The rows of attention, forward and backward, as attention.cpp includes them once for each instruction set: it sets
// V (a struct of vector16.hpp), ROWS (the name of the class), TARGET and INLINE (what functions need to use those
// instructions), and HALF where it can convert float16.
// No include guard for that reason.
//
// Letters: S keys, W value width.

struct ROWS {
    using F = V::F;

    // The logits of 16 keys, and their derivative by the score; what is dropped or hidden is minus infinity.
    struct Logit {
        F value, slope;
    };
    TARGET INLINE static Logit logit(const Row& row, const Scores& how, int64_t i, F score, bool drop_keys) {
        Logit out{V::mul(score, V::all(how.scale)), V::all(1.0f)};
        if (how.softcap > 0.0f) {
            // tanh(z) = 1 - 2 / (exp(2 z) + 1)
            const F e = V::exp(V::mul(out.value, V::all(2.0f / how.softcap)));
            const F tanh = V::sub(V::all(1.0f), V::div(V::all(2.0f), V::add(e, V::all(1.0f))));
            out.value = V::mul(tanh, V::all(how.softcap));
            out.slope = V::sub(V::all(1.0f), V::mul(tanh, tanh));
        }
        const F hidden = V::all(kMinusInfinity);
        if (row.bias) out.value = V::add(out.value, V::load(row.bias + i));
        if (row.seen) out.value = V::where(V::bytes(row.seen + i), out.value, hidden);
        if (drop_keys) out.value = V::where(V::kept(row.key_lanes + i, how.drop_keys), out.value, hidden);
        return out;
    }

    // A copy of the last keys of a row, fewer than 16, with room for 16; what is beyond them is hidden or zero.
    struct Rest {
        float scores[16], grads[16], bias[16];
        uint8_t seen[16];
        uint16_t key_lanes[16], lanes[16];
        Row row;
        TARGET Rest(const Row& of, int64_t i, int64_t n, const float* x, const float* g) : row(of) {
            for (int j = 0; j < 16; ++j) scores[j] = kMinusInfinity, grads[j] = bias[j] = 0.0f, seen[j] = 0;
            std::memset(key_lanes, 0, sizeof(key_lanes)), std::memset(lanes, 0, sizeof(lanes));
            const size_t count = static_cast<size_t>(n);
            std::memcpy(scores, x + i, count * sizeof(float));
            if (g) std::memcpy(grads, g + i, count * sizeof(float));
            if (of.bias) std::memcpy(bias, of.bias + i, count * sizeof(float)), row.bias = bias;
            // Keys that are not there are hidden by this mask, whatever the scale makes of their scores.
            if (of.seen) std::memcpy(seen, of.seen + i, count);
            else std::memset(seen, 1, count);
            row.seen = seen;
            if (of.key_lanes) std::memcpy(key_lanes, of.key_lanes + i, count * sizeof(uint16_t)), row.key_lanes = key_lanes;
            if (of.lanes) std::memcpy(lanes, of.lanes + i, count * sizeof(uint16_t)), row.lanes = lanes;
        }
    };

    template <bool Write>
    TARGET INLINE static float pass(const Row& row, const Scores& how, float* x, bool drop_keys) {
        F top = V::all(kMinusInfinity);
        int64_t i = 0;
        for (; i + 16 <= row.n; i += 16) {
            const F value = logit(row, how, i, V::load(x + i), drop_keys).value;
            top = V::max(top, value);
            if (Write) V::store(x + i, value);
        }
        if (i < row.n) {
            Rest rest(row, i, row.n - i, x, nullptr);
            const F value = logit(rest.row, how, 0, V::load(rest.scores), drop_keys).value;
            top = V::max(top, value);
            V::store(rest.scores, value);
            if (Write) std::memcpy(x + i, rest.scores, static_cast<size_t>(row.n - i) * sizeof(float));
        }
        return V::top(top);
    }

    // Whether DropKey is in force in a row: not where it would drop every key that is seen.
    TARGET INLINE static bool drops_keys(const Row& row, const Scores& how, float* x) {
        return row.key_lanes && pass<false>(row, how, x, true) > kMinusInfinity;
    }

    TARGET INLINE static float top_of(const float* x, int64_t n) {
        F top0 = V::all(kMinusInfinity), top1 = top0;
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) top0 = V::max(top0, V::load(x + i)), top1 = V::max(top1, V::load(x + i + 16));
        for (; i + 16 <= n; i += 16) top0 = V::max(top0, V::load(x + i));
        float top = V::top(V::max(top0, top1));
        for (; i < n; ++i) top = x[i] > top ? x[i] : top;
        return top;
    }

    // The weights with dropout in place of the scores; returns the log of the sum of exponentials.
    TARGET static float forward(const Row& row, const Scores& how, float* x) {
        float scale = how.scale, top;
        if (how.plain) top = top_of(x, row.n) * scale;
        else top = pass<true>(row, how, x, drops_keys(row, how, x)), scale = 1.0f;
        if (row.sink > top) top = row.sink;
        if (top == kMinusInfinity) {  // no key is seen
            std::memset(x, 0, static_cast<size_t>(row.n) * sizeof(float));
            return -kMinusInfinity;
        }
        const F by = V::all(scale), less = V::all(-top);
        F sum0 = V::all(0.0f), sum1 = sum0;
        int64_t i = 0;
        for (; i + 32 <= row.n; i += 32) {
            const F e0 = V::exp(V::mul_add(V::load(x + i), by, less));
            const F e1 = V::exp(V::mul_add(V::load(x + i + 16), by, less));
            V::store(x + i, e0), V::store(x + i + 16, e1);
            sum0 = V::add(sum0, e0), sum1 = V::add(sum1, e1);
        }
        float sum = 0.0f;
        if (i + 16 <= row.n) {
            const F e = V::exp(V::mul_add(V::load(x + i), by, less));
            V::store(x + i, e);
            sum0 = V::add(sum0, e), i += 16;
        }
        for (; i < row.n; ++i) sum += x[i] = exp_of(x[i] * scale - top);
        sum += V::sum(V::add(sum0, sum1)) + (row.sink > kMinusInfinity ? exp_of(row.sink - top) : 0.0f);
        const float share = how.keep_scale / sum;
        const F shares = V::all(share);
        if (row.lanes) {
            for (i = 0; i + 16 <= row.n; i += 16)
                V::store(x + i, V::or_zero(V::kept(row.lanes + i, how.drop), V::mul(V::load(x + i), shares)));
            for (; i < row.n; ++i) x[i] = row.lanes[i] >= how.drop ? x[i] * share : 0.0f;
        } else {
            for (i = 0; i + 16 <= row.n; i += 16) V::store(x + i, V::mul(V::load(x + i), shares));
            for (; i < row.n; ++i) x[i] *= share;
        }
        return top + std::log(sum);
    }

    TARGET static float dot(const float* a, const float* b, int64_t n) {
        F sum = V::all(0.0f);
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) sum = V::mul_add(V::load(a + i), V::load(b + i), sum);
        float out = V::sum(sum);
        for (; i < n; ++i) out += a[i] * b[i];
        return out;
    }

    // From scores and the gradient of the dropped weights: the dropped weights, and the gradient of the products of
    // queries and keys in place of it. With P the softmax and D the mask with its scale: P D, and scale P (D dY - delta).
    template <bool Plain, bool Drop>
    TARGET INLINE static void sixteen(const Row& row, const Scores& how, int64_t i, float* x, float* g, F less, F delta,
                                      bool drop_keys) {
        F e, slope{};
        if (Plain) {
            e = V::exp(V::mul_add(V::load(x), V::all(how.scale), less));
        } else {
            const Logit at = logit(row, how, i, V::load(x), drop_keys);
            e = V::exp(V::add(at.value, less)), slope = at.slope;
        }
        F up = V::mul(V::load(g), V::all(how.keep_scale)), weight = V::mul(e, V::all(how.keep_scale));
        if (Drop) {
            const typename V::M kept = V::kept(row.lanes + i, how.drop);
            up = V::or_zero(kept, up), weight = V::or_zero(kept, weight);
        }
        V::store(x, weight);
        F down = V::mul(V::mul(e, V::all(how.scale)), V::sub(up, delta));
        if (!Plain) down = V::mul(down, slope);
        V::store(g, down);
    }

    template <bool Plain, bool Drop>
    TARGET static void backward_of(const Row& row, const Scores& how, float* x, float* g, float lse, float delta) {
        const bool drop_keys = !Plain && drops_keys(row, how, x);
        const F less = V::all(-lse), deltas = V::all(delta);
        int64_t i = 0;
        for (; i + 16 <= row.n; i += 16) sixteen<Plain, Drop>(row, how, i, x + i, g + i, less, deltas, drop_keys);
        if (i < row.n) {
            Rest rest(row, i, row.n - i, x, g);
            sixteen<Plain, Drop>(rest.row, how, 0, rest.scores, rest.grads, less, deltas, drop_keys);
            std::memcpy(x + i, rest.scores, static_cast<size_t>(row.n - i) * sizeof(float));
            std::memcpy(g + i, rest.grads, static_cast<size_t>(row.n - i) * sizeof(float));
        }
    }
    TARGET static void backward(const Row& row, const Scores& how, float* x, float* g, float lse, float delta) {
        if (how.plain)
            row.lanes ? backward_of<true, true>(row, how, x, g, lse, delta)
                      : backward_of<true, false>(row, how, x, g, lse, delta);
        else
            row.lanes ? backward_of<false, true>(row, how, x, g, lse, delta)
                      : backward_of<false, false>(row, how, x, g, lse, delta);
    }

    template <class T>
    TARGET static void widen_row(const T* from, float* to, int64_t n) {
        int64_t i = 0;
#ifdef HALF
        if constexpr (std::is_same_v<T, F16>)
            for (; i + 8 <= n; i += 8)
                _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
        for (; i < n; ++i) to[i] = widen(from[i]);
    }
    template <class T>
    TARGET static void narrow_row(const float* from, T* to, int64_t n) {
        int64_t i = 0;
#ifdef HALF
        if constexpr (std::is_same_v<T, F16>)
            for (; i + 8 <= n; i += 8)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                                 _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
        for (; i < n; ++i) narrow(from[i], to[i]);
    }
};
