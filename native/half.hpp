// bfloat16 and float16 as float32 and back, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace twodice {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(F16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
    if (rest >= 0x7C00u) return bits_as<float>(sign | 0x7F800000u | (rest << 13));  // infinity, NaN
    if (rest < 0x0400u) {                                                           // zero, subnormal: exact
        const float magnitude = static_cast<float>(rest) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return bits_as<float>(sign | ((rest << 13) + 0x38000000u));
}

inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, Bf16& out) {
    const uint32_t bits = bits_as<uint32_t>(v);
    out.bits = v != v ? 0x7FC0u : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float v, F16& out) {
    const uint32_t bits = bits_as<uint32_t>(v), rest = bits & 0x7FFFFFFFu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    uint32_t half;
    if (rest > 0x7F800000u) {
        half = 0x7E00u;
    } else if (rest >= 0x477FF000u) {  // rounds beyond the largest: infinity
        half = 0x7C00u;
    } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 makes the hardware round at the right bit
        half = bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3F000000u;
    } else {
        half = (rest - 0x38000000u + 0x0FFFu + ((rest >> 13) & 1u)) >> 13;
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace twodice
