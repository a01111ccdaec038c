// 64-bit uniforms in two levels, Gumbel noise, logarithm and exponential: the twin of src/twodice/random/noise.py.
// The same operations in the same order; compiled without contraction, so the bits are the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.hpp"

namespace twodice {

inline constexpr uint32_t kSecondLevel = 0x80000000u;
inline constexpr double kLn2High = 6.93147180369123816490e-01;
inline constexpr double kLn2Low = 1.90821492927058770002e-10;
inline constexpr double kLog2E = 1.44269504088896338700e00;
inline constexpr double kRound = 6755399441055744.0;       // 1.5 * 2^52
inline constexpr int64_t kRoundBits = 0x4338000000000000;  // its bits: an integer added to it stands in the low ones
inline constexpr int64_t kOneBits = 0x3FF0000000000000;
inline constexpr double kLg[7] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                  2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                  1.479819860511658591e-01};

template <class To, class From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Where in the stream: everything but the token id.
struct Place {
    uint64_t key;
    uint32_t position, completion, purpose;
};

inline uint32_t leading16(const Place& at, uint32_t id) {
    const Words words = philox4x32(id >> 3, at.position, at.completion, at.purpose, at.key);
    const uint32_t lane = id & 7;
    const uint32_t word = lane < 4 ? (lane < 2 ? words.w0 : words.w1) : (lane < 6 ? words.w2 : words.w3);
    return (word >> ((lane & 1) << 4)) & 0xFFFFu;
}

inline uint64_t uniform64(const Place& at, uint32_t id, uint32_t high) {
    const Words words = philox4x32(id, at.position, at.completion, at.purpose + kSecondLevel, at.key);
    const uint64_t low = words.w0 | (uint64_t{words.w1 & 0xFFFFu} << 32);
    return (uint64_t{high} << 48) | low;
}

inline double log_core(double f, double k) {
    const double s = f / (2.0 + f);
    const double z = s * s;
    const double w = z * z;
    const double even = w * (kLg[1] + w * (kLg[3] + w * kLg[5]));
    const double odd = z * (kLg[0] + w * (kLg[2] + w * (kLg[4] + w * kLg[6])));
    const double rest = odd + even;
    const double half = (0.5 * f) * f;
    return k * kLn2High - ((half - (s * (half + rest) + k * kLn2Low)) - f);
}

inline double noise_log(double x) {
    const int64_t bits = bits_of<int64_t>(x);
    const int64_t k = (bits - int64_t{0x3FE6A09E667F3BCD}) >> 52;
    const double m = bits_of<double>(bits - k * (int64_t{1} << 52));
    return log_core(m - 1.0, static_cast<double>(k));
}

inline double log1p_minus(double w) {
    const bool halve = w > 0.2928932188134524;
    return log_core(halve ? 1.0 - 2.0 * w : -w, halve ? -1.0 : 0.0);
}

inline double gumbel_from_bits(uint64_t u) {
    const bool lower = (u >> 63) == 0;
    const double v = (static_cast<double>(static_cast<int64_t>(lower ? u : ~u)) + 0.5) * 0x1p-64;
    return -noise_log(-(lower ? log1p_minus(v) : noise_log(v)));
}

inline double gumbel(const Place& at, uint32_t id) {
    return gumbel_from_bits(uniform64(at, id, leading16(at, id)));
}

// Above every Gumbel noise whose 16 leading bits are h, by at most 0.06 + what log1p adds. E >= w >= h / 2^16, and the
// bits of a float, read as an integer, never overstate its logarithm.
inline double gumbel_bound(uint32_t h) {
    const double log2_low = bits_of<int32_t>(static_cast<float>(h)) * 0x1p-23 - 127.0;
    return h == 0 ? 45.1 : (16.0 - log2_low) * 0.6931471805599454;
}

// exp for z <= 0, 0 or nearly below -700; in loops over arrays the compiler makes vectors of it.
inline double noise_exp(double z) {
    const double low = z > -700.0 ? z : -700.0;
    const double shifted = low * kLog2E + kRound;
    const double n = shifted - kRound;
    const double r = (low - n * kLn2High) - n * kLn2Low;
    double y = 1.0 / 39916800.0;
    y = y * r + 1.0 / 3628800.0;
    y = y * r + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r + 1.0;
    y = y * r + 1.0;
    const int64_t scale = static_cast<int64_t>((bits_of<uint64_t>(shifted) << 52) + static_cast<uint64_t>(kOneBits));
    return y * bits_of<double>(scale);
}

// round_half_even(exp(z) * 2^42): the addition of 1.5 * 2^52 does the rounding.
inline int64_t noise_weight(double z) {
    return bits_of<int64_t>(noise_exp(z) * 0x1p42 + kRound) - kRoundBits;
}

}  // namespace twodice
