// The chain on one row. Included once for each instruction set, inside a namespace of its own (see sampling.cpp).
// No include guard on purpose, and no system header: those belong outside the target region.
//
// Every stage keeps a contiguous range of the rank order (value, then id). A key packs (value, id) so that a larger key
// stands earlier in the order. What is kept is either a prefix of the whole row, given by the key of its last token
// (`cut_`), or an explicit list of keys. The readable twin is src/twodice/kernels/sampling_reference.py.

template <class F>
struct Order;

template <>
struct Order<float> {
    using Key = uint64_t;
    using Bits = uint32_t;
    static inline Bits ordered(float x) {
        const uint32_t b = bits_of<uint32_t>(x + 0.0f);  // -0 becomes +0: they are equal
        return b ^ (static_cast<uint32_t>(static_cast<int32_t>(b) >> 31) | 0x80000000u);
    }
    static inline float value(Bits o) { return bits_of<float>(o & 0x80000000u ? o ^ 0x80000000u : ~o); }
};

template <>
struct Order<double> {
    using Key = unsigned __int128;
    using Bits = uint64_t;
    static inline Bits ordered(double x) {
        const uint64_t b = bits_of<uint64_t>(x + 0.0);
        return b ^ (static_cast<uint64_t>(static_cast<int64_t>(b) >> 63) | 0x8000000000000000u);
    }
    static inline double value(Bits o) { return bits_of<double>(o >> 63 ? o ^ 0x8000000000000000u : ~o); }
};

template <class F>
class Chain {
    using O = Order<F>;
    using Key = typename O::Key;
    using Bits = typename O::Bits;
    static constexpr int64_t kChunk = 256;

   public:
    Chain(const Logits& in, const Job& job, Scratch& scratch) : in_(in), job_(job), s_(scratch) {}

    int run(int64_t row, Result& out) {
        const Settings& set = job_.settings[job_.one_setting ? 0 : row];
        flip_ = (set.rules & kHighIdFirst) ? 0u : 0xFFFFFFFFu;
        const int status = prepare(row, set);
        if (status != kOk) return status;
        at_ = Place{job_.keys[job_.one_key ? 0 : row],
                    static_cast<uint32_t>(job_.positions ? job_.positions[row] : job_.one_position),
                    static_cast<uint32_t>(job_.completions ? job_.completions[row] : job_.one_completion),
                    kPurposeToken};
        top_ = wide_max_;
        const uint8_t* stage = set.stages;
        for (; *stage != kEnd; ++stage) {
            if (*stage == kTopP && whole() && !(set.rules & kJoint) && lazy(stage)) break;
            apply(*stage, set, row);
        }
        const Key drawn = *stage != kEnd ? draw_top_p(set.top_p) : greedy_ ? list()[0] : have_list_ ? draw_list() : draw_all();
        if (steered_) job_.state[row] = mu_ - set.mirostat_eta * (surprise_of(drawn) - set.mirostat_tau);
        finish(row, drawn, out);
        return kOk;
    }

   private:
    std::vector<Key>& list() const { return s_.template buffers<F>().keys; }
    std::vector<F>& maxima() const { return s_.template buffers<F>().maxima; }
    Key key(F x, uint32_t i) const { return (static_cast<Key>(O::ordered(x)) << 32) | (i ^ flip_); }
    uint32_t index(Key k) const { return static_cast<uint32_t>(k) ^ flip_; }
    static Key least_of(F x) { return static_cast<Key>(O::ordered(x)) << 32; }  // not above any key of this value
    double z_of(F x) const { return (static_cast<double>(x) - top_) / temperature_; }
    double z_of(Key k) const { return z_of(x_[index(k)]); }
    uint32_t id_of(uint32_t index) const { return ids_ ? static_cast<uint32_t>(ids_[index]) : index; }
    int64_t block_count() const { return (n_ + kBlock - 1) / kBlock; }
    int64_t block_end(int64_t b) const { return b * kBlock + kBlock < n_ ? b * kBlock + kBlock : n_; }
    bool whole() const { return !have_list_ && cut_ == 0; }

    void apply(uint8_t stage, const Settings& set, int64_t row) {
        switch (stage) {
            case kTemperature: temperature_ = set.temperature; break;
            case kDynatemp: dynatemp(set); break;
            case kGreedy: greedy(); break;
            case kTopNSigma: top_n_sigma(set.top_n_sigma); break;
            case kTopK: top_k(set.top_k, (set.rules & kTiesAtK) != 0); break;
            case kTopP: top_p(set.top_p, (set.rules & kJoint) != 0); break;
            case kMinP: keep_where([&](double z) { return z >= set.log_min_p; }); break;
            case kTopH: top_h(set.top_h); break;
            case kTypical: typical(set.typical_p); break;
            case kEpsilon: least(set.log_epsilon, log_total()); break;
            case kEta: {
                const Moments m = moments();
                const double other = 0.5 * set.log_eta - m.entropy;
                least(set.log_eta < other ? set.log_eta : other, m.log_total);
                break;
            }
            case kXtc: xtc(set); break;
            case kMirostat: mirostat(set, row); break;
        }
    }

    // ---- stages 1 to 3 ----

    // The lowest index of the greatest value.
    uint32_t argmax() const {
        int64_t b = 0;
        while (!(maxima()[b] == max_)) ++b;
        int64_t i = b * kBlock;
        while (!(x_[i] == max_)) ++i;
        return static_cast<uint32_t>(i);
    }

    void take_maxima(int64_t begin, int64_t end) {
        bool bad = false;  // the logits had no NaN, and edits make none
        for (int64_t b = begin; b < end; ++b)
            maxima()[b] = block_max<F>(x_ + b * kBlock, block_end(b) - b * kBlock, bad);
    }

    void take_top() {
        F best = -INFINITY;
        const F* m = maxima().data();
        for (int64_t b = 0; b < block_count(); ++b) best = m[b] > best ? m[b] : best;
        max_ = best;
        wide_max_ = static_cast<double>(best);
    }

    int prepare(int64_t row, const Settings& set) {
        const char* start = in_.data + row * in_.row_bytes;
        const bool direct = in_.column_stride == 1 && in_.type == (sizeof(F) == 4 ? kFloat32 : kFloat64);
        edited_ = edited(set);
        n_ = in_.vocabulary;
        auto& values = s_.template buffers<F>().values;
        if (direct && !edited_) {
            x_ = reinterpret_cast<const F*>(start);
        } else {
            values.resize(n_);
            x_ = values.data();
        }
        maxima().resize(block_count());
        bool bad = false;
        for (int64_t b = 0; b < block_count(); ++b) {  // a block is widened and read again while it is near
            const int64_t begin = b * kBlock, count = block_end(b) - begin;
            if (x_ == values.data()) widen<F>(in_, start, begin, count, values.data() + begin);
            maxima()[b] = block_max<F>(x_ + begin, count, bad);
        }
        if (bad) return kNan;
        take_top();
        if (max_ == INFINITY) return kInfinite;
        if (edited_) {
            edit(row, set, values);
            take_top();
            if (max_ == INFINITY) return kInfinite;
        }
        return max_ == -INFINITY ? kEmpty : kOk;
    }

    bool edited(const Settings& set) const {
        auto nothing = [](int64_t) {};
        return Editor<F, decltype(nothing)>::wanted(job_, set);
    }

    void edit(int64_t row, const Settings& set, std::vector<F>& values) {
        auto& touched = s_.blocks;
        touched.assign(block_count(), 0);
        auto touch = [&](int64_t id) { touched[id / kBlock] = 1; };
        Editor<F, decltype(touch)>(job_, set, s_, n_, row, values.data(), touch).run();
        if (set.allowed.begin < set.allowed.end) {
            const int64_t count = set.allowed.end - set.allowed.begin;
            ids_ = job_.ids + set.allowed.begin;  // ascending, so the order of places is the order of ids
            for (int64_t j = 0; j < count; ++j) values[j] = values[ids_[j]];
            n_ = count;
            maxima().resize(block_count());
            take_maxima(0, block_count());
            return;
        }
        for (int64_t b = 0; b < block_count(); ++b)
            if (touched[b]) take_maxima(b, b + 1);
    }

    // ---- what is kept, and sums over it ----

    // Calls fn(values, count) over everything that is kept, in chunks; what is not kept is -inf there.
    template <class Fn>
    void for_kept(Fn fn) const {
        F chunk[kChunk];
        if (have_list_) {
            const auto& keys = list();
            const int64_t size = static_cast<int64_t>(keys.size());
            for (int64_t begin = 0; begin < size; begin += kChunk) {
                const int64_t count = size - begin < kChunk ? size - begin : kChunk;
                for (int64_t j = 0; j < count; ++j) chunk[j] = x_[index(keys[begin + j])];
                fn(chunk, count);
            }
            return;
        }
        for (int64_t begin = 0; begin < n_; begin += kChunk) {
            const int64_t count = n_ - begin < kChunk ? n_ - begin : kChunk;
            if (cut_ == 0) {
                fn(x_ + begin, count);
                continue;
            }
            for (int64_t j = 0; j < count; ++j) {
                const F x = x_[begin + j];
                chunk[j] = key(x, static_cast<uint32_t>(begin + j)) >= cut_ ? x : static_cast<F>(-INFINITY);
            }
            fn(chunk, count);
        }
    }

    int64_t total() const {
        int64_t sum = 0;
        for_kept([&](const F* x, int64_t count) {
            int64_t weight[kChunk];
            weigh<F>(x, count, top_, temperature_, weight);
            for (int64_t j = 0; j < count; ++j) sum += weight[j];
        });
        return sum;
    }

    static double log_of(int64_t mass) { return noise_log(static_cast<double>(mass) * 0x1p-42); }
    double log_total() const { return log_of(total()); }

    struct Moments {
        int64_t mass = 0, moment = 0;
        double log_total = 0, entropy = 0;
    };

    Moments moments() const {
        Moments out;
        for_kept([&](const F* x, int64_t count) {
            int64_t weight[kChunk], moment[kChunk];
            weigh_moments<F>(x, count, top_, temperature_, weight, moment);
            for (int64_t j = 0; j < count; ++j) out.mass += weight[j], out.moment += moment[j];
        });
        out.log_total = log_of(out.mass);
        out.entropy = out.log_total + static_cast<double>(out.moment) / static_cast<double>(out.mass);
        return out;
    }

    // Everything that is kept as a list, unsorted.
    void make_list() {
        if (have_list_) return;
        collect(cut_ == 0 ? static_cast<F>(-INFINITY) : O::value(static_cast<Bits>(cut_ >> 32)), list());
        if (cut_ != 0) drop_below(cut_);
        have_list_ = true;
        sorted_ = false;
    }

    void drop_below(Key least) {
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k < least; }), keys.end());
    }

    // The first of what is kept.
    Key first() const {
        if (have_list_) return *std::max_element(list().begin(), list().end());
        uint32_t i = argmax();
        if (flip_ == 0)
            for (uint32_t j = i + 1; j < n_; ++j) i = x_[j] == max_ ? j : i;
        return key(max_, i);
    }

    // Keep keys from `least` on, which is not above the first.
    void keep_from(Key least) {
        if (have_list_) {
            drop_below(least);
            return;
        }
        if (least > cut_) cut_ = least;
        shrink();
    }

    // A list in the place of a cut where few blocks reach it.
    void shrink() {
        const F bound = O::value(static_cast<Bits>(cut_ >> 32));
        int64_t blocks = 0;
        for (int64_t b = 0; b < block_count(); ++b) blocks += maxima()[b] >= bound;
        if (blocks <= 64) make_list();
    }

    // Keep the tokens whose z satisfies a condition that holds for a prefix, and at least the first. The least value for
    // which it holds is found by bisection over the ordered bits of the floats.
    template <class Holds>
    void keep_where(Holds holds) {
        const F top = static_cast<F>(top_);
        if (!holds(z_of(top))) {
            keep_from(first());
            return;
        }
        Bits low = O::ordered(-std::numeric_limits<F>::max()), high = O::ordered(top);
        if (holds(z_of(O::value(low)))) return;  // for everything that lives
        while (high - low > 1) {
            const Bits middle = low + (high - low) / 2;
            (holds(z_of(O::value(middle))) ? high : low) = middle;
        }
        keep_from(static_cast<Key>(high) << 32);
    }

    void least(double log_least, double log_sum) {
        keep_where([&](double z) { return z - log_sum >= log_least; });
    }

    // Every living key whose value is at least `bound`, in order of index.
    void collect(F bound, std::vector<Key>& out) const {
        out.clear();
        for (int64_t b = 0; b < block_count(); ++b)
            if (maxima()[b] >= bound) collect_block(b, bound, out);
    }

    void collect_block(int64_t b, F low, F high, std::vector<Key>& out) const {
        for (int64_t i = b * kBlock; i < block_end(b); ++i)
            if (x_[i] >= low && x_[i] <= high && x_[i] > -INFINITY) out.push_back(key(x_[i], static_cast<uint32_t>(i)));
    }

    void collect_block(int64_t b, F bound, std::vector<Key>& out) const {
        const int64_t begin = b * kBlock, end = block_end(b);
        int64_t i = begin;
#ifdef TWODICE_LEVEL_AVX2
        if constexpr (sizeof(F) == 4) {
            const __m256 least = _mm256_set1_ps(bound);
            for (; i + 8 <= end; i += 8) {
                const __m256 v = _mm256_loadu_ps(reinterpret_cast<const float*>(x_ + i));
                unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ)));
                while (mask != 0) {
                    const int64_t at = i + __builtin_ctz(mask);
                    if (x_[at] > -INFINITY) out.push_back(key(x_[at], static_cast<uint32_t>(at)));
                    mask &= mask - 1;
                }
            }
        }
#endif
        for (; i < end; ++i)
            if (x_[i] >= bound && x_[i] > -INFINITY) out.push_back(key(x_[i], static_cast<uint32_t>(i)));
    }

    // The `count` first keys of the rank order, unsorted; fewer where fewer live. The count-th largest of the maxima of
    // blocks, or of groups of blocks, which are fewer to look at, is not above the count-th largest value: only blocks that
    // reach it are read again.
    void select(int64_t count, std::vector<Key>& out) {
        F bound = -INFINITY;
        if (count <= block_count()) {
            int64_t group = 1;
            while (group < 8 && block_count() / (2 * group) >= 2 * count) group *= 2;
            auto& most = s_.template buffers<F>().copy;
            most.clear();
            for (int64_t b = 0; b < block_count(); b += group) {
                F m = maxima()[b];
                for (int64_t j = b + 1; j < b + group && j < block_count(); ++j) m = maxima()[j] > m ? maxima()[j] : m;
                most.push_back(m);
            }
            std::nth_element(most.begin(), most.begin() + (count - 1), most.end(), std::greater<F>());
            bound = most[count - 1];
        }
        collect(bound, out);
        if (static_cast<int64_t>(out.size()) > count) {
            std::nth_element(out.begin(), out.begin() + (count - 1), out.end(), std::greater<Key>());
            out.resize(count);
        }
    }

    void sort_list() {
        if (!sorted_) std::sort(list().begin(), list().end(), std::greater<Key>());
        sorted_ = true;
    }

    // Length of the shortest prefix of the list at which `reached` becomes true, when the tokens are added one by one in
    // order of rank, or the whole length; the list is put so that this prefix stands first. `add(sum, values, count)`
    // adds a chunk. Halves the part in which the end must lie, without sorting all of it.
    template <class Sum, class Add, class Reached>
    int64_t prefix(Sum sum, Add add, Reached reached) {
        auto& keys = list();
        int64_t low = 0, high = static_cast<int64_t>(keys.size());
        F chunk[kChunk];
        while (!sorted_ && high - low > 64) {
            const int64_t middle = low + (high - low) / 2;
            std::nth_element(keys.begin() + low, keys.begin() + middle, keys.begin() + high, std::greater<Key>());
            Sum left = sum;
            for (int64_t begin = low; begin < middle; begin += kChunk) {
                const int64_t count = middle - begin < kChunk ? middle - begin : kChunk;
                for (int64_t j = 0; j < count; ++j) chunk[j] = x_[index(keys[begin + j])];
                add(left, chunk, count);
            }
            if (reached(left)) {
                high = middle;
            } else {
                low = middle;
                sum = left;
            }
        }
        if (!sorted_) std::sort(keys.begin() + low, keys.begin() + high, std::greater<Key>());
        for (int64_t j = low; j < high; ++j) {
            add(sum, &x_[index(keys[j])], 1);
            if (reached(sum)) return j + 1;
        }
        return static_cast<int64_t>(keys.size());
    }

    // ---- stages 4 to 10 ----

    void greedy() {
        uint32_t best;
        if (whole()) {
            best = argmax();
        } else {
            make_list();
            const Bits most = static_cast<Bits>(first() >> 32);
            best = 0xFFFFFFFFu;
            for (const Key k : list())
                if (static_cast<Bits>(k >> 32) == most && index(k) < best) best = index(k);
        }
        only(key(x_[best], best));
        greedy_ = true;
        temperature_ = 1.0;
    }

    void only(Key k) {
        list().assign(1, k);
        have_list_ = sorted_ = true;
        top_ = static_cast<double>(x_[index(k)]);
    }

    int64_t count_kept() const {
        if (have_list_) return static_cast<int64_t>(list().size());
        int64_t count = 0;
        for_kept([&](const F* x, int64_t size) {
            for (int64_t j = 0; j < size; ++j) count += x[j] > -INFINITY;
        });
        return count;
    }

    void dynatemp(const Settings& set) {
        const double low = std::max(set.temperature - set.dynatemp_range, 0.0);
        const double high = set.temperature + set.dynatemp_range;
        const int64_t n = count_kept();
        double found = set.temperature;
        if (n > 1) {
            double share = moments().entropy / noise_log(static_cast<double>(n));
            share = share < 0.0 ? 0.0 : share > 1.0 ? 1.0 : share;
            double power = 0.0;
            if (share >= 0x1p-1022) {
                const double exponent = set.dynatemp_exponent * noise_log(share);
                power = exponent < -700.0 ? 0.0 : noise_exp(exponent);
            }
            if (set.dynatemp_exponent == 0.0) power = 1.0;
            found = low + (high - low) * power;
        }
        if (found == 0.0) {
            only(first());
            greedy_ = true;
            temperature_ = 1.0;
        } else {
            temperature_ = found;
        }
    }

    void top_n_sigma(double n_sigma) {
        int64_t sum = 0, high = 0, low = 0, n = 0;
        for_kept([&](const F* x, int64_t size) {
            for (int64_t j = 0; j < size; ++j) {
                if (!(x[j] > -INFINITY)) continue;
                double u = static_cast<double>(x[j]) - top_;
                u = u > -1024.0 ? u : -1024.0;
                const int64_t q = bits_of<int64_t>(u * 0x1p20 + kRound) - kRoundBits, square = q * q;
                sum += q, high += square >> 32, low += square & 0xFFFFFFFF, ++n;
            }
        });
        const double count = static_cast<double>(n), mean = static_cast<double>(sum) / count;
        const double square = static_cast<double>(high) * 4294967296.0 + static_cast<double>(low);
        const double variance = square / count - mean * mean;
        const double limit = (n_sigma * n_sigma) * (variance > 0.0 ? variance : 0.0) / 0x1p40;
        const double warm = temperature_;
        temperature_ = 1.0;  // the distance of logits, not of z
        keep_where([&](double u) { return u * u <= limit; });
        temperature_ = warm;
    }

    void top_k(int64_t k, bool ties) {
        if (have_list_) {
            auto& keys = list();
            if (k >= static_cast<int64_t>(keys.size())) return;
            if (!sorted_) std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<Key>());
            const Key last = keys[k - 1];
            if (ties) {
                drop_below(last >> 32 << 32);
            } else {
                keys.resize(k);
            }
            return;
        }
        if (k >= n_) return;
        if (cut_ != 0) {
            make_list();
            top_k(k, ties);
            return;
        }
        select(k, list());
        have_list_ = true;
        sorted_ = false;
        if (!ties || static_cast<int64_t>(list().size()) < k) return;
        const Key last = *std::min_element(list().begin(), list().end());
        collect(O::value(static_cast<Bits>(last >> 32)), list());
    }

    static int64_t need_of(double p, int64_t total) {
        const double wanted = std::ceil(p * static_cast<double>(total));
        const int64_t need = wanted < 1.0 ? 1 : static_cast<int64_t>(wanted);
        return need < total ? need : total;
    }

    // Length of the shortest prefix of the list whose mass reaches `need`, or the whole length.
    int64_t mass_prefix(int64_t need) {
        return prefix(
            int64_t{0},
            [&](int64_t& sum, const F* x, int64_t count) {
                int64_t weight[kChunk];
                weigh<F>(x, count, top_, temperature_, weight);
                for (int64_t j = 0; j < count; ++j) sum += weight[j];
            },
            [&](int64_t sum) { return sum >= need; });
    }

    void top_p(double p, bool joint) {
        if (whole() && !joint) {
            top_p_whole(p);
            return;
        }
        if (!joint) {
            make_list();
            list().resize(mass_prefix(need_of(p, total())));
            return;
        }
        int64_t all = 0;
        for (int64_t begin = 0; begin < n_; begin += kChunk) {
            int64_t weight[kChunk];
            const int64_t count = n_ - begin < kChunk ? n_ - begin : kChunk;
            weigh<F>(x_ + begin, count, wide_max_, temperature_, weight);
            for (int64_t j = 0; j < count; ++j) all += weight[j];
        }
        make_list();
        list().resize(mass_prefix(need_of(p, all) + 1));  // a prefix that reaches the need exactly has one token more
    }

    // ---- top-p over a whole row, without a list of it ----

    // The exact prefix. A sample of the row says between which two values the cut will lie; one pass adds up the masses of
    // all, of what stands above this window, and collects what is in it. Where the cut is not there after all, the window
    // becomes the rest of the row.
    void top_p_whole(double p) {
        F low, high;
        window(p, low, high);
        auto& keys = list();
        for (;;) {
            int64_t all = 0, above = 0;
            keys.clear();
            for (int64_t b = 0; b < block_count(); ++b) {
                int64_t weight[kBlock];
                const int64_t begin = b * kBlock, count = block_end(b) - begin;
                weigh<F>(x_ + begin, count, top_, temperature_, weight);
                int64_t sum = 0, over = 0;
                for (int64_t j = 0; j < count; ++j) sum += weight[j];
                if (maxima()[b] > high)
                    for (int64_t j = 0; j < count; ++j) over += x_[begin + j] > high ? weight[j] : 0;
                all += sum, above += over;
                if (maxima()[b] >= low) collect_block(b, low, high, keys);
            }
            const int64_t need = need_of(p, all);
            have_list_ = true;
            sorted_ = false;
            const int64_t inside = above < need ? total() : 0;
            if (above < need && above + inside >= need) {
                const int64_t length = mass_prefix(need - above);
                const Key last = *std::min_element(keys.begin(), keys.begin() + length);
                have_list_ = false;
                keep_from(last);
                return;
            }
            have_list_ = false;
            low = -INFINITY;
            high = max_;
        }
    }

    // Between which values the cut lies, by a sample of at most 1,024 tokens: half of the window's mass to each side of the
    // need, by far more than the sample is likely to be wrong by.
    void window(double p, F& low, F& high) const {
        constexpr int64_t kSample = 1024;
        low = -INFINITY;
        high = max_;
        if (n_ < 4 * kSample) return;
        F values[kSample];
        int64_t weight[kSample];
        const int64_t step = n_ / kSample;
        for (int64_t j = 0; j < kSample; ++j) values[j] = x_[j * step];
        std::sort(values, values + kSample, std::greater<F>());
        weigh<F>(values, kSample, top_, temperature_, weight);
        double all = 0, sum = 0;
        for (const int64_t w : weight) all += static_cast<double>(w);
        if (!(all > 0)) return;
        const double margin = 0.06;
        bool open = true;
        for (int64_t j = 0; j < kSample; ++j) {
            sum += static_cast<double>(weight[j]);
            if (open && sum >= (p - margin) * all) {
                if (j > 0 && p > margin) high = values[j - 1];
                open = false;
            }
            if (sum > (p + margin) * all) {
                low = values[j];
                return;
            }
        }
    }

    static constexpr int64_t kLazy = 1024;  // tokens; below, the exact way is as fast

    // Whether the prefix need not be known: nothing follows that reads it.
    bool lazy(const uint8_t* stage) const {
        constexpr int kReads = kNeedLogprob | kNeedKept | kNeedMass | kNeedEntropy;
        return sizeof(F) == 4 && stage[1] == kEnd && (job_.need & kReads) == 0 && temperature_ > 1e-4 &&
               temperature_ < 1e4 && n_ >= kLazy;
    }

    // Draws under top-p without its cut: the token drawn from everything is the one of the kept ones if it is kept, which
    // is seen from the mass that stands before it. If it is not, the cut lies above it, and what is above is drawn again.
    // Masses are summed in float32 with a bound; what this cannot decide goes the exact way.
    Key draw_top_p(double p) {
        const float inverse = static_cast<float>(1.0 / temperature_), top = static_cast<float>(max_);
        const float* const x = reinterpret_cast<const float*>(x_);
        if (peaked(top, inverse) && head_top_p(p, rough_sums(x, n_, top, inverse, INFINITY).all)) return draw_list();
        for (int tries = 0; p > 0.1 && tries < 8; ++tries) {
            const Key drawn = draw_all();
            const float value = static_cast<float>(x_[index(drawn)]);
            // At least what stands before the token: everything above it, and its equals but itself.
            const Rough most = rough_sums(x, n_, top, inverse, std::nextafter(value, -INFINITY));
            const double error = kRough * most.all;
            if (most.above - noise_exp(z_of(static_cast<F>(value))) + error < p * (most.all - error)) return drawn;
            if (drawn == first()) return drawn;
            const Rough least = rough_sums(x, n_, top, inverse, value);
            if (least.above - error <= p * (least.all + error)) break;
            cut_ = drawn + 1;
        }
        cut_ = 0;
        top_p_whole(p);
        return have_list_ ? draw_list() : draw_all();
    }

    static constexpr int64_t kHead = 64;

    // Whether a few tokens are likely to hold the mass that top-p asks for: few block maxima are near the top.
    bool peaked(float top, float inverse) const {
        const float* const m = reinterpret_cast<const float*>(maxima().data());
        return rough_sums(m, block_count(), top, inverse, INFINITY).all < 6.0;
    }

    // Keep the prefix among the first `kHead` tokens, if the bounds on the sum of all say which one it is.
    bool head_top_p(double p, double all) {
        const double error = kRough * all;
        select(kHead, list());
        have_list_ = true;
        sorted_ = false;
        sort_list();
        auto& keys = list();
        double sum = 0;
        size_t length = 0;
        for (; length < keys.size(); ++length) {
            if (length > 0 && sum >= p * (all - error)) {  // may be enough already
                if (sum < p * (all + error)) break;
                keys.resize(length);
                return true;
            }
            sum += static_cast<double>(noise_weight(z_of(keys[length]))) * 0x1p-42;
        }
        have_list_ = sorted_ = false;
        return false;
    }

    void top_h(double share) {
        const Moments all = moments();
        auto part = [&](const Moments& m) {
            return static_cast<double>(m.mass) * all.log_total + static_cast<double>(m.moment);
        };
        const double most = share * part(all);
        make_list();
        const int64_t size = static_cast<int64_t>(list().size());
        int64_t length = prefix(
            Moments{},
            [&](Moments& sum, const F* x, int64_t count) {
                int64_t weight[kChunk], moment[kChunk];
                weigh_moments<F>(x, count, top_, temperature_, weight, moment);
                for (int64_t j = 0; j < count; ++j) sum.mass += weight[j], sum.moment += moment[j];
            },
            [&](const Moments& sum) { return part(sum) > most; });
        // The token that goes beyond the limit goes, unless the whole list stayed within it.
        if (length < size || part(all) > most) --length;
        auto& keys = list();
        keys.resize(length < 1 ? 1 : length);
        const Key head = first();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k != head && noise_weight(z_of(k)) == 0; }),
                   keys.end());
    }

    void typical(double p) {
        const Moments all = moments();
        make_list();
        auto& found = s_.distances;
        found.clear();
        for (const Key k : list()) {
            const double z = z_of(k);
            found.push_back({std::fabs((all.log_total - z) - all.entropy), noise_weight(z)});
        }
        const int64_t need = need_of(p, all.mass);
        auto nearer = [](const Distance& a, const Distance& b) { return a.distance < b.distance; };
        int64_t low = 0, high = static_cast<int64_t>(found.size()), sum = 0;
        while (high - low > 64) {
            const int64_t middle = low + (high - low) / 2;
            std::nth_element(found.begin() + low, found.begin() + middle, found.begin() + high, nearer);
            int64_t left = sum;
            for (int64_t j = low; j < middle; ++j) left += found[j].mass;
            if (left >= need) {
                high = middle;
            } else {
                low = middle;
                sum = left;
            }
        }
        std::sort(found.begin() + low, found.begin() + high, nearer);
        while (low < high && (sum += found[low].mass) < need) ++low;
        const double last = found[low < high ? low : high - 1].distance;
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(),
                                  [&](Key k) { return !(std::fabs((all.log_total - z_of(k)) - all.entropy) <= last); }),
                   keys.end());
        renew_top();
    }

    void renew_top() { top_ = static_cast<double>(x_[index(first())]); }

    void xtc(const Settings& set) {
        const double p = set.xtc_probability;
        const bool expected = (set.rules & kXtcExpected) != 0;
        if (!expected) {
            Place at = at_;
            at.purpose = kPurposeXtc;
            if (!(static_cast<double>(uniform64(at, 0, leading16(at, 0)) >> 11) * 0x1p-53 < p)) return;
        }
        const int64_t all = total();
        const double log_sum = log_of(all);
        make_list();
        Key last = ~Key{0};  // the least probable of the likely
        int64_t likely = 0;
        for (const Key k : list()) {
            if (!(z_of(k) - log_sum >= set.log_xtc_threshold)) continue;
            ++likely;
            last = k < last ? k : last;
        }
        if (likely < 2) return;
        if (expected && p < 1.0) {
            int64_t gone = 0;
            for (const Key k : list())
                if (k > last) gone += noise_weight(z_of(k));
            const double sum = static_cast<double>(all), stays = 1.0 - p;
            mixed_ = last;
            shift_ = noise_log(stays);
            rest_ = noise_log(stays + p / ((sum - static_cast<double>(gone)) / sum));
            return;
        }
        auto& keys = list();
        keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key k) { return k > last; }), keys.end());
        renew_top();
    }

    void mirostat(const Settings& set, int64_t row) {
        mu_ = job_.state[row];
        if (mu_ != mu_) mu_ = 2.0 * set.mirostat_tau;
        steered_ = true;
        const double log_sum = log_total(), mu = mu_;
        keep_where([&](double z) { return (log_sum - z) * kLog2E <= mu; });
    }

    // In bits, in the distribution from which it was drawn.
    double surprise_of(Key drawn) const { return (log_total() - final_z(drawn)) * kLog2E; }

    // z after XTC by expectation.
    double final_z(Key k) const { return z_of(k) + (k > mixed_ ? shift_ : rest_); }

    // ---- the draw ----

    // Score, then the lower id, which is the lower index.
    struct Best {
        double score = -INFINITY;
        uint32_t index = 0xFFFFFFFFu;
        void offer(double candidate, uint32_t at) {
            if (candidate > score || (candidate == score && at < index)) {
                score = candidate;
                index = at;
            }
        }
    };

    Key draw_list() const {
        Best best;
        for (const Key k : list()) {
            const uint32_t i = index(k), id = id_of(i);
            const double z = final_z(k);
            if (z + 45.1 < best.score) continue;
            const uint32_t high = leading16(at_, id);
            if (z + gumbel_bound(high) + 1e-6 < best.score) continue;
            best.offer(z + gumbel_from_bits(uniform64(at_, id, high)), i);
        }
        return key(x_[best.index], best.index);
    }

    Key draw_all() {
        run_.set_key(at_.key);
        run_.set_row(at_.position, at_.completion, at_.purpose);
        Best best;
        const uint32_t first = argmax();  // a good score early lets most others go unread
        if (key(x_[first], first) >= cut_) best.offer(0.0 + gumbel(at_, id_of(first)), first);
        const F* m = maxima().data();
        int64_t begin = 0;
        while (begin < block_count()) {
            // Blocks that stand behind each other are drawn in one go.
            auto wanted = [&](int64_t b) {
                return z_of(m[b]) + 45.1 >= best.score && (least_of(m[b]) | 0xFFFFFFFFu) >= cut_;
            };
            if (!wanted(begin)) {
                ++begin;
                continue;
            }
            int64_t end = begin + 1;
            while (end < block_count() && end - begin < kDrawn && wanted(end)) ++end;
            draw_blocks(begin, end, best);
            begin = end;
        }
        return key(x_[best.index], best.index);
    }

    void try_one(const Place& at, uint32_t index, uint32_t high, Best& best) const {
        if (!(x_[index] > -INFINITY) || key(x_[index], index) < cut_) return;
        const double z = z_of(x_[index]);
        if (z + gumbel_bound(high) + 1e-6 < best.score) return;
        best.offer(z + gumbel_from_bits(uniform64(at, id_of(index), high)), index);
    }

    void draw_blocks(int64_t from, int64_t to, Best& best) const {
        const uint32_t begin = static_cast<uint32_t>(from * kBlock), end = static_cast<uint32_t>(block_end(to - 1));
        if (ids_) {
            for (uint32_t i = begin; i < end; ++i) {
                const double z = z_of(x_[i]);
                if (z + 45.1 < best.score) continue;
                try_one(at_, i, leading16(at_, id_of(i)), best);
            }
            return;
        }
        alignas(64) uint16_t lanes[kDrawn * kBlock];
        fill_lanes(run_, begin >> 3, (end - begin + 7) / 8, lanes);
        uint32_t i = begin;
        // z + bound > score in float32 for many tokens at once. The margin covers its rounding; a NaN (0 * inf at a tiny
        // temperature) passes on to the exact test. A difference of logits that overflows is decided by it only while the
        // temperature cannot bring it back.
#if defined(TWODICE_LEVEL_AVX512)
        if (sizeof(F) == 4 && temperature_ < 1e30) {
            const __m512 scale = _mm512_set1_ps(static_cast<float>(1.0 / temperature_));
            const __m512 top = _mm512_set1_ps(static_cast<float>(max_));
            const __m512 slope = _mm512_set1_ps(-0x1p-23f * 0.6931472f), offset = _mm512_set1_ps(143.0f * 0.6931472f);
            __m512 least = _mm512_set1_ps(static_cast<float>(best.score) - 2e-3f);
            for (; i + 16 <= end; i += 16) {
                const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes + (i - begin)));
                const __m512 h = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(high));
                const __m512 bits = _mm512_cvtepi32_ps(_mm512_castps_si512(h));
                const __m512 bound = _mm512_add_ps(_mm512_mul_ps(bits, slope), offset);
                const __m512 x = _mm512_loadu_ps(reinterpret_cast<const float*>(x_ + i));
                const __m512 z = _mm512_mul_ps(_mm512_sub_ps(x, top), scale);
                unsigned mask = _mm512_cmp_ps_mask(_mm512_add_ps(z, bound), least, _CMP_NLE_UQ);
                if (mask == 0) continue;
                for (; mask != 0; mask &= mask - 1) {
                    const uint32_t j = i + static_cast<uint32_t>(__builtin_ctz(mask));
                    try_one(at_, j, lanes[j - begin], best);
                }
                least = _mm512_set1_ps(static_cast<float>(best.score) - 2e-3f);
            }
        }
#elif defined(TWODICE_LEVEL_AVX2)
        if (sizeof(F) == 4 && temperature_ < 1e30) {
            const __m256 scale = _mm256_set1_ps(static_cast<float>(1.0 / temperature_));
            const __m256 top = _mm256_set1_ps(static_cast<float>(max_));
            const __m256 slope = _mm256_set1_ps(-0x1p-23f * 0.6931472f), offset = _mm256_set1_ps(143.0f * 0.6931472f);
            __m256 least = _mm256_set1_ps(static_cast<float>(best.score) - 2e-3f);
            for (; i + 8 <= end; i += 8) {
                const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes + (i - begin)));
                const __m256 h = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(high));
                const __m256 bits = _mm256_cvtepi32_ps(_mm256_castps_si256(h));
                const __m256 bound = _mm256_add_ps(_mm256_mul_ps(bits, slope), offset);
                const __m256 x = _mm256_loadu_ps(reinterpret_cast<const float*>(x_ + i));
                const __m256 z = _mm256_mul_ps(_mm256_sub_ps(x, top), scale);
                const __m256 out = _mm256_cmp_ps(_mm256_add_ps(z, bound), least, _CMP_LE_OQ);
                unsigned mask = ~static_cast<unsigned>(_mm256_movemask_ps(out)) & 0xFFu;
                if (mask == 0) continue;
                for (; mask != 0; mask &= mask - 1) {
                    const uint32_t j = i + static_cast<uint32_t>(__builtin_ctz(mask));
                    try_one(at_, j, lanes[j - begin], best);
                }
                least = _mm256_set1_ps(static_cast<float>(best.score) - 2e-3f);
            }
        }
#endif
        for (; i < end; ++i) try_one(at_, i, lanes[i - begin], best);
    }

    // ---- everything that was asked for beside the token ----

    void finish(int64_t row, Key drawn, Result& out) {
        const uint32_t at = index(drawn);
        out.token = id_of(at);
        const int need = job_.need;
        if (need == 0) return;
        if (need & kNeedRank) out.rank = rank_of(drawn);
        if (need & kNeedKept) {
            make_list();
            sort_list();
            for (const Key k : list()) out.kept.push_back(id_of(index(k)));
        }
        if (need & (kNeedLogprob | kNeedEntropy)) final_odds(drawn, out);
        if (need & (kNeedTemperature | kNeedMass | kNeedTemperatureEntropy)) warm_odds(drawn, out);
        if (need & kNeedRaw) raw(row, out);
    }

    int64_t rank_of(Key drawn) const {
        int64_t count = 0;
        for (int64_t b = 0; b < block_count(); ++b) {
            if ((least_of(maxima()[b]) | 0xFFFFFFFFu) < drawn) continue;
            for (int64_t i = b * kBlock; i < block_end(b); ++i) count += key(x_[i], static_cast<uint32_t>(i)) > drawn;
        }
        return count;
    }

    void final_odds(Key drawn, Result& out) const {
        Sums sums;
        if (mixed_ != ~Key{0}) {
            for (const Key k : list()) sums.add(final_z(k));
        } else {
            for_kept([&](const F* x, int64_t count) { sum_exps<F>(x, count, top_, temperature_, sums); });
        }
        out.logprob = final_z(drawn) - std::log(sums.mass);
        out.entropy = std::log(sums.mass) - sums.moment / sums.mass;
    }

    void warm_odds(Key drawn, Result& out) const {
        if (greedy_) {
            out.temperature = out.temperature_entropy = 0.0;
            out.mass = 1.0;
            return;
        }
        Sums all, kept;
        sum_exps<F>(x_, n_, wide_max_, temperature_, all);
        if (job_.need & kNeedMass)
            for_kept([&](const F* x, int64_t count) { sum_exps<F>(x, count, wide_max_, temperature_, kept); });
        const double z = (static_cast<double>(x_[index(drawn)]) - wide_max_) / temperature_;
        out.temperature = z - std::log(all.mass);
        out.mass = kept.mass / all.mass;
        out.temperature_entropy = std::log(all.mass) - all.moment / all.mass;
    }

    void raw(int64_t row, Result& out) const {
        const F* x = x_;
        double top = wide_max_;
        if (edited_) {
            auto& values = s_.template buffers<F>().raw;
            values.resize(in_.vocabulary);
            widen<F>(in_, in_.data + row * in_.row_bytes, 0, in_.vocabulary, values.data());
            x = values.data();
            top = static_cast<double>(*std::max_element(values.begin(), values.end()));
        }
        Sums all;
        sum_exps<F>(x, in_.vocabulary, top, 1.0, all);
        out.raw = static_cast<double>(x[out.token]) - top - std::log(all.mass);
    }

    const Logits& in_;
    const Job& job_;
    Scratch& s_;
    const F* x_ = nullptr;
    const int64_t* ids_ = nullptr;
    int64_t n_ = 0;
    uint32_t flip_ = 0xFFFFFFFFu;
    F max_ = 0;
    double wide_max_ = 0, top_ = 0, temperature_ = 1, mu_ = 0;
    Key cut_ = 0;
    Key mixed_ = ~Key{0};  // keys above it pay `shift_`, the others get `rest_`
    double shift_ = 0, rest_ = 0;
    Place at_{};
    Run run_;  // of the draw
    bool have_list_ = false, sorted_ = false, greedy_ = false, steered_ = false, edited_ = false;
};

int run_row(const Logits& in, const Job& job, Scratch& scratch, int64_t row, Result& out) {
    if (in.type == kFloat64) return Chain<double>(in, job, scratch).run(row, out);
    return Chain<float>(in, job, scratch).run(row, out);
}
