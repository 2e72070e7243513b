// Kept values in NEON: eight columns at once, put in place by a table look-up whose indices are a row of another table.
// See sparse.h for the interface.
#pragma once

#include "cpu/simd/neon_dotprod.h"
#include "cpu/sparse/sparse.h"

namespace llmkern::LLMKERN_NS {

constexpr int EXPAND_VECTORS = 4;
constexpr int EXPAND_CHUNK = EXPAND_VECTORS * F32::WIDTH;

template <Kept, Order>
constexpr int expanded_column(int p) {
    return p;
}

// Row b: for each of eight columns, which BYTES bytes of the kept values it takes if bit b of the column is set, else
// 255, for which a look-up gives 0.
template <int BYTES>
struct PlaceTable {
    uint8_t place[256][8 * BYTES];

    constexpr PlaceTable() : place() {
        for (int bits = 0; bits < 256; ++bits)
            for (int column = 0, next = 0; column < 8; ++column) {
                const bool kept = bits >> column & 1;
                for (int i = 0; i < BYTES; ++i)
                    place[bits][column * BYTES + i] = static_cast<uint8_t>(kept ? next * BYTES + i : 255);
                next += kept;
            }
    }
};
template <int BYTES>
alignas(64) static constexpr PlaceTable<BYTES> PLACES{};

// Nibble p0 | p1 << 2 -> 1 << p0 | 1 << p1, for the two nibbles of a byte.
struct PositionTable {
    uint8_t bits[256];

    constexpr PositionTable() : bits() {
        for (int byte = 0; byte < 256; ++byte)
            for (int half = 0; half < 8; half += 4)
                for (int at = half; at < half + 4; at += 2)
                    bits[byte] = static_cast<uint8_t>(bits[byte] | 1 << (half + (byte >> at & 3)));
    }
};
alignas(64) static constexpr PositionTable POSITIONS{};

LLMKERN_INLINE uint64_t bits_of_positions(const uint8_t* positions) {
    return POSITIONS.bits[positions[0]] | POSITIONS.bits[positions[1]] << 8;
}

// 8 codes, those of the set bits of eight columns in their columns, as two vectors times scale.
LLMKERN_INLINE void expand_codes(F32* w, uint8_t eight, int8x8_t codes, F32 scale) {
    const int8x16_t table = vcombine_s8(codes, vdup_n_s8(0));
    const int16x8_t placed = vmovl_s8(vqtbl1_s8(table, vld1_u8(PLACES<1>.place[eight])));
    w[0].v = vmulq_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(placed))), scale.v);
    w[1].v = vmulq_f32(vcvtq_f32_s32(vmovl_high_s16(placed)), scale.v);
}

// 8 bytes, or 4 and zeros.
template <Count COUNT>
LLMKERN_INLINE int8x8_t load_codes(const uint8_t* from) {
    if (COUNT == Count::ANY) return vreinterpret_s8_u8(vld1_u8(from));
    uint32_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return vreinterpret_s8_u32(vset_lane_u32(word, vdup_n_u32(0), 0));
}

template <Kept KEPT, Count COUNT>
LLMKERN_INLINE void expand_floats(F32* w, uint8_t eight, const uint8_t* from) {
    if constexpr (KEPT == Kept::F32) {
        const uint8x16_t second = COUNT == Count::ANY ? vld1q_u8(from + 16) : vdupq_n_u8(0);
        const uint8x16x2_t table = {{vld1q_u8(from), second}};
        for (int v = 0; v < 2; ++v)
            w[v].v = vreinterpretq_f32_u8(vqtbl2q_u8(table, vld1q_u8(PLACES<4>.place[eight] + 16 * v)));
    } else {
        const uint8x16_t table = COUNT == Count::ANY ? vld1q_u8(from) : vcombine_u8(vld1_u8(from), vdup_n_u8(0));
        const uint16x8_t placed = vreinterpretq_u16_u8(vqtbl1q_u8(table, vld1q_u8(PLACES<2>.place[eight])));
        if constexpr (KEPT == Kept::BF16) {
            w[0].v = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(placed), 16));
            w[1].v = vreinterpretq_f32_u32(vshll_high_n_u16(placed, 16));
        } else {
            const float16x8_t halves = vreinterpretq_f16_u16(placed);
            w[0].v = vcvt_f32_f16(vget_low_f16(halves));
            w[1].v = vcvt_high_f32_f16(halves);
        }
    }
}

template <Kept KEPT, Order, Count COUNT>
LLMKERN_INLINE void expand(F32 (&w)[EXPAND_VECTORS], uint64_t bits, const uint8_t* from, F32 scale) {
    const auto first = static_cast<uint8_t>(bits), second = static_cast<uint8_t>(bits >> 8);
    const int64_t step = kept_bytes(KEPT, COUNT == Count::TWO_OF_FOUR ? 4 : __builtin_popcount(first));
    if constexpr (KEPT == Kept::I4) {
        static_assert(COUNT == Count::TWO_OF_FOUR, "int4 values are 2:4");
        // A byte hl becomes the bytes l - 8 and h - 8: the four of the first columns, then those of the second.
        const uint8x8_t bytes = vreinterpret_u8_s8(load_codes<COUNT>(from));
        const uint8x8_t codes = vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
        const int8x8_t centred = vsub_s8(vreinterpret_s8_u8(codes), vdup_n_s8(8));
        expand_codes(w, first, centred, scale);
        expand_codes(w + 2, second, vext_s8(centred, centred, 4), scale);
    } else if constexpr (KEPT == Kept::I8) {
        expand_codes(w, first, load_codes<COUNT>(from), scale);
        expand_codes(w + 2, second, load_codes<COUNT>(from + step), scale);
    } else {
        expand_floats<KEPT, COUNT>(w, first, from);
        expand_floats<KEPT, COUNT>(w + 2, second, from + step);
    }
}

}  // namespace llmkern::LLMKERN_NS
