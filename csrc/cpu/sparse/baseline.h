// Kept values in plain C++. See sparse.h for the interface.
#pragma once

#include "cpu/simd/baseline.h"
#include "cpu/sparse/sparse.h"

namespace llmkern::baseline {

constexpr int EXPAND_VECTORS = 4;
constexpr int EXPAND_CHUNK = EXPAND_VECTORS * F32::WIDTH;

template <Kept, Order>
constexpr int expanded_column(int p) {
    return p;
}

LLMKERN_INLINE uint64_t bits_of_positions(const uint8_t* positions) {
    uint64_t bits = 0;
    for (int quad = 0; quad < EXPAND_CHUNK / 4; ++quad) {
        const int nibble = positions[quad / 2] >> quad % 2 * 4;
        bits |= (uint64_t{1} << (nibble & 3) | uint64_t{1} << (nibble >> 2 & 3)) << 4 * quad;
    }
    return bits;
}

template <Kept KEPT>
LLMKERN_INLINE float load_kept(const uint8_t* from, int index) {
    if constexpr (KEPT == Kept::I4) return static_cast<float>((from[index / 2] >> index % 2 * 4 & 15) - 8);
    constexpr DType dtype = KEPT == Kept::F32    ? DType::F32
                            : KEPT == Kept::BF16 ? DType::BF16
                            : KEPT == Kept::F16  ? DType::F16
                                                 : DType::I8;
    return load_one(from, dtype, index);
}

template <Kept KEPT, Order, Count>
LLMKERN_INLINE void expand(F32 (&w)[EXPAND_VECTORS], uint64_t bits, const uint8_t* from, F32 scale) {
    float part[EXPAND_CHUNK] = {};
    for (int next = 0; bits; bits &= bits - 1) part[__builtin_ctzll(bits)] = load_kept<KEPT>(from, next++);
    for (int v = 0; v < EXPAND_VECTORS; ++v) {
        w[v] = load(part + v * F32::WIDTH);
        if (KEPT == Kept::I8 || KEPT == Kept::I4) w[v] = w[v] * scale;
    }
}

}  // namespace llmkern::baseline
