// BLAKE2b (RFC 7693) without a key, of one block, with a digest of 8 bytes: how a key is derived from its parent's by name.
// The twin of random/keys.py, which has it from Python's hashlib.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace twodice {

inline constexpr size_t kBlakeBlock = 128;

// The digest read little-endian; `message` has at most kBlakeBlock bytes.
inline uint64_t blake2b_8(const uint8_t* message, size_t length) {
    constexpr uint64_t iv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    constexpr uint8_t order[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
    uint8_t block[kBlakeBlock] = {};
    std::memcpy(block, message, length);
    uint64_t m[16], v[16];
    for (int i = 0; i < 16; ++i) {
        m[i] = 0;
        for (int j = 7; j >= 0; --j) m[i] = m[i] << 8 | block[8 * i + j];
    }
    const uint64_t first = iv[0] ^ 0x01010008;  // no key, digest of 8 bytes
    for (int i = 0; i < 8; ++i) v[i] = v[i + 8] = iv[i];
    v[0] = first;
    v[12] ^= length;
    v[14] = ~v[14];  // the last block
    auto turned = [](uint64_t x, int by) { return x >> by | x << (64 - by); };
    auto mix = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
        v[a] += v[b] + x, v[d] = turned(v[d] ^ v[a], 32);
        v[c] += v[d], v[b] = turned(v[b] ^ v[c], 24);
        v[a] += v[b] + y, v[d] = turned(v[d] ^ v[a], 16);
        v[c] += v[d], v[b] = turned(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
        const uint8_t* const s = order[round % 10];
        for (int i = 0; i < 4; ++i) mix(i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
        for (int i = 0; i < 4; ++i)
            mix(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
    }
    return first ^ v[0] ^ v[8];
}

}  // namespace twodice
