// Philox, its low lanes and dropout at every instruction level of the architecture that this is compiled for, held
// against the portable loops, with no Python: so that a level can be checked on a machine that has it only in an emulator.
//
// Prints a line "level NAME" for each, and "digest HEX" of all that the portable loops gave: the same on every
// architecture. Ends with 1 where a level differs. With the argument "sabotage" the levels get one input wrong.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "dropout_rows.hpp"
#include "lanes_low.hpp"

namespace twodice {
namespace {

// Inputs from integers alone: the same on every architecture.
struct Source {
    uint64_t state = 1;
    uint64_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return state ^ (state >> 29);
    }
};

void value(Source& from, float& out) {
    uint32_t bits = static_cast<uint32_t>(from.next() >> 16);
    const uint32_t kind = static_cast<uint32_t>(from.next() >> 40) % 16;
    if (kind < 10) bits = (bits & 0x81FFFFFFu) | 0x3E000000u;  // ordinary; the rest: any bits, or one of the special
    if (kind == 10) bits = (bits & 0x80000000u) | 0x7F800000u;
    if (kind == 11) bits = 0x7FC00000u;
    if (kind == 12) bits &= 0x80000000u;
    if (kind == 13) bits &= 0x807FFFFFu;
    if (kind == 14) bits = (bits & 0x80FFFFFFu) | 0x38000000u;  // subnormal in float16
    out = bits_as<float>(bits);
}
void value(Source& from, double& out) {
    float v;
    value(from, v);
    out = static_cast<double>(v) * (1.0 + static_cast<double>(from.next() >> 40) * 0x1p-50);
}
void value(Source& from, Bf16& out) {
    float v;
    value(from, v);
    narrow(v, out);
}
void value(Source& from, F16& out) {
    float v;
    value(from, v);
    narrow(v, out);
}

// The bits of a result; every NaN counts as one, whose payload IEEE 754 leaves open.
uint64_t bits(float v) { return v != v ? 0x7FC00000u : bits_as<uint32_t>(v); }
uint64_t bits(double v) { return v != v ? 0x7FF8000000000000u : bits_as<uint64_t>(v); }
template <class T>
uint64_t bits(T v) {
    return widen(v) != widen(v) ? 0x7FFFu : v.bits;
}

struct Check {
    bool sabotage = false;
    uint64_t digest = 1469598103934665603u;  // FNV-1a
    std::vector<int64_t> wrong = std::vector<int64_t>(static_cast<size_t>(best_simd()) + 1);
    int64_t compared = 0;

    void note(uint64_t v) { digest = (digest ^ v) * 1099511628211u; }

    void lanes() {
        const uint32_t starts[] = {0, 5, 0xFFFFFFFDu, (3u << 20) | 77u};
        std::vector<size_t> counts = {64, 1000};
        for (size_t n = 1; n <= 40; ++n) counts.push_back(n);
        for (const uint32_t c0 : starts) {
            for (const size_t n : counts) {
                const uint64_t key = 0x0123456789ABCDEFu * (n + c0);
                Run run;
                run.set_key(key);
                run.set_row(c0 + 3, 17, 0x80000000u + static_cast<uint32_t>(n));
                for (size_t level = 0; level < wrong.size(); ++level) {
                    simd_level().store(static_cast<Simd>(level));
                    std::vector<uint16_t> out(8 * n + 8, 0xA5A5);
                    fill_lanes(run, c0 + (sabotage && level ? 1 : 0), n, out.data());
                    for (size_t i = 0; i < n; ++i) {
                        const Words w = philox4x32(c0 + static_cast<uint32_t>(i), c0 + 3, 17,
                                                   0x80000000u + static_cast<uint32_t>(n), key);
                        const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
                        for (size_t j = 0; j < 8; ++j)
                            wrong[level] += out[8 * i + j] != static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
                    }
                    for (size_t j = 8 * n; j < out.size(); ++j) wrong[level] += out[j] != 0xA5A5;
                }
            }
        }
    }

    // A limit is the least lane of one of its groups, where <= and < part, or one less, or all or nothing is low.
    void low() {
        for (size_t n = 1; n <= 8 * kLowGroups; n += n < 40 || n > 240 ? 1 : 37) {
            const uint64_t key = 0xFEDCBA9876543210u + n;
            const uint32_t c0 = n % 3 ? 0xFFFFFFF0u : 11;
            Run run;
            run.set_key(key);
            run.set_row(5, 17, 3);
            simd_level().store(Simd::portable);
            std::vector<uint16_t> all(8 * n);
            fill_lanes(run, c0, n, all.data());
            auto group = [&](size_t i) { return all.begin() + std::min(i * kLowGroup, all.size()); };
            for (size_t kind = 0; kind < 5; ++kind) {
                uint16_t limits[kLowGroups / 2] = {};
                for (size_t i = 0; i < (n + 15) / 16; ++i) {
                    const size_t of = 2 * i + (kind + i) % 2;
                    const size_t from = group(of) == all.end() ? 2 * i : of;
                    const uint16_t least = *std::min_element(group(from), group(from + 1));
                    const uint16_t kinds[] = {least, static_cast<uint16_t>(least - (least > 0)), least, 0, 65535};
                    limits[i] = kinds[(kind + i / 2) % 5];
                }
                for (size_t level = 0; level < wrong.size(); ++level) {
                    simd_level().store(static_cast<Simd>(level));
                    std::vector<uint16_t> out(8 * n + 8, 0xA5A5);
                    const uint32_t found =
                        fill_low_lanes(run, c0 + (sabotage && level ? 1 : 0), n, limits, out.data(), Ahead{});
                    for (size_t i = 0; i < kLowGroups; ++i) {
                        auto at_most = [&](uint16_t x) { return x <= limits[i / 2]; };
                        const bool is_low = std::any_of(group(i), group(i + 1), at_most);
                        const bool is_written = found >> i & 1;
                        wrong[level] += is_low && !is_written;
                        wrong[level] += is_written && group(i) == all.end();
                        for (auto x = group(i); x != group(i + 1); ++x) {
                            const uint16_t made = out[static_cast<size_t>(x - all.begin())];
                            wrong[level] += made != *x && (is_written || made != 0xA5A5);
                        }
                    }
                    for (size_t j = 8 * n; j < out.size(); ++j) wrong[level] += out[j] != 0xA5A5;
                }
            }
        }
    }

    template <class T>
    void dropout(int code, int64_t C, int64_t start, int64_t stride, bool add, bool columns, uint16_t threshold) {
        constexpr int64_t B = 2, H = 2, T_ = 2;
        Source source{static_cast<uint64_t>(C * 131 + start * 7 + stride + code)};
        const int64_t row = C * stride + start, size = B * H * T_ * row + 64;
        std::vector<T> x(static_cast<size_t>(size)), r(x.size());
        for (T& v : x) value(source, v);
        for (T& v : r) value(source, v);
        const int64_t example[B] = {3, 0xFFFFFFFF}, position[T_] = {0xFFFFFFFF, 5};
        std::vector<int64_t> column(static_cast<size_t>(C));
        for (int64_t i = 0; i < C; ++i) column[static_cast<size_t>(i)] = i * 7919 % 4001 + 100;

        Call call{};
        call.B = B, call.H = H, call.T = T_, call.C = C;
        const int64_t strides[4] = {H * T_ * row, T_ * row, row, stride};
        for (auto* to : {call.x_stride, call.y_stride, call.residual_stride}) std::memcpy(to, strides, sizeof strides);
        call.x = reinterpret_cast<const char*>(x.data() + start);
        call.residual = add ? reinterpret_cast<const char*>(r.data() + start) : nullptr;
        call.example = example, call.example_stride[0] = 1;
        call.position = position, call.position_stride[1] = 1;
        if (columns) {
            call.column = column.data(), call.column_stride[1] = 1;
            call.ranges.assign(B, {*std::min_element(column.begin(), column.end()),
                                   *std::max_element(column.begin(), column.end())});
        }
        call.step = 0xFFFFFFFEu;
        call.rate.threshold = threshold;
        call.rate.scale_double = 65536.0 / (65536 - threshold);
        call.rate.scale = static_cast<float>(call.rate.scale_double);
        call.dense = stride == 1 || C == 1;
        call.block = columns ? C : kBlock;
        call.blocks = (C + call.block - 1) / call.block;
        call.run.set_key(0xFEDCBA9876543210u + static_cast<uint64_t>(C));

        std::vector<T> expected;
        for (size_t level = 0; level < wrong.size(); ++level) {
            simd_level().store(static_cast<Simd>(level));
            std::vector<T> y = r;  // what is not written must stay
            call.y = reinterpret_cast<char*>(y.data() + start);
            if (sabotage && level) call.rate.threshold = static_cast<uint16_t>(threshold ^ 0x4000);
            all(call, code, 0, B * H * T_ * call.blocks);
            call.rate.threshold = threshold;
            if (level == 0) {
                expected = y;
                for (const T& v : y) note(bits(v));
                compared += size;
            }
            for (size_t i = 0; i < y.size(); ++i) wrong[level] += bits(y[i]) != bits(expected[i]);
        }
    }

    template <class T>
    void type(int code) {
        std::vector<int64_t> widths = {200, 1000, kBlock + 65};
        for (int64_t C = 1; C <= 131; ++C) widths.push_back(C);
        const uint16_t thresholds[] = {0, 1, 6554, 32768, 65535};
        int64_t turn = 0;
        for (const int64_t C : widths)
            for (const int64_t start : {0, 1})
                for (const bool add : {false, true})
                    for (int i = 0; i < 2; ++i) dropout<T>(code, C, start, 1, add, false, thresholds[turn++ % 5]);
        for (const int64_t C : {1, 15, 33, 100, 1100})
            for (const bool add : {false, true})
                for (const bool columns : {false, true})
                    for (const int64_t stride : {1, 2}) dropout<T>(code, C, 1, stride, add, columns, 20000);
    }
};

}  // namespace
}  // namespace twodice

int main(int argc, char** argv) {
    using namespace twodice;
    Check check;
    check.sabotage = argc > 1 && std::string(argv[1]) == "sabotage";
    check.lanes();
    check.low();
    check.type<float>(0);
    check.type<double>(1);
    check.type<Bf16>(2);
    check.type<F16>(3);
    bool good = true;
    for (size_t level = 0; level < check.wrong.size(); ++level) {
        std::printf("level %s\n", kSimdNames[level]);
        if (check.wrong[level])
            std::printf("%s differs at %lld places\n", kSimdNames[level], static_cast<long long>(check.wrong[level]));
        good = good && check.wrong[level] == 0;
    }
    std::printf("compared %lld\ndigest %016llx\n", static_cast<long long>(check.compared),
                static_cast<unsigned long long>(check.digest));
    return good ? 0 : 1;
}
