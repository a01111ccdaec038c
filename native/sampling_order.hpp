// Floats as integers of the same order, from which the keys of tokens are made. A part of sampling_level.hpp.

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
