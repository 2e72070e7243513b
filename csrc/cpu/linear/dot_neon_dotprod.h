// Byte dot products for the integer driver (see integer_quad.inl and integer_tile.inl for the interfaces).
#pragma once

#include "cpu/simd/neon_dotprod.h"

#include "cpu/linear/dot_neon.h"

namespace llmkern::LLMKERN_NS {

// See integer_tile.inl. sdot takes a dword of x from any lane: 6 rows of x by 4 registers of w take 24 sums, 4
// registers and 2 for x: 30 of 32, for 6 loads per 24 products.
struct TileBase {
    static constexpr bool FAST = true;
    static constexpr int VECTORS = 4, X_ROWS = 6, BYTES = 16, STEP = 4;
    static constexpr int STEP_BYTES = VECTORS * 16;

    static LLMKERN_INLINE_MEMBER void pack(const int8_t* codes, int64_t ld, int rows, int64_t steps, uint32_t* to) {
        for (int64_t s = 0; s < steps; ++s)
            for (int r = 0; r < rows; ++r) __builtin_memcpy(to + s * rows + r, codes + r * ld + s * STEP, 4);
    }

    template <int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply(I32 (&sums)[ROWS][VECTORS], const uint8_t* tile, const uint32_t* x,
                                               int64_t steps) {
        for (int64_t s = 0; s < steps; ++s) {
            int8x16_t w[VECTORS];
            for (int v = 0; v < VECTORS; ++v) w[v] = vreinterpretq_s8_u8(vld1q_u8(tile + s * STEP_BYTES + v * 16));
            multiply_rows<0>(sums, w, x + s * ROWS);
        }
    }

    // The first `bytes` bytes at each of the rows, zeros behind them, turned: to[i] lane j = dword i of row j.
    static LLMKERN_INLINE_MEMBER void load_turned(const uint8_t* const (&rows)[4], int bytes, uint8x16_t (&to)[4]) {
        uint32x4_t s[4];
        for (int i = 0; i < 4; ++i) s[i] = vreinterpretq_u32_u8(load_bytes(rows[i], bytes));
        const uint32x4_t low02 = vzip1q_u32(s[0], s[2]), high02 = vzip2q_u32(s[0], s[2]);
        const uint32x4_t low13 = vzip1q_u32(s[1], s[3]), high13 = vzip2q_u32(s[1], s[3]);
        to[0] = vreinterpretq_u8_u32(vzip1q_u32(low02, low13));
        to[1] = vreinterpretq_u8_u32(vzip2q_u32(low02, low13));
        to[2] = vreinterpretq_u8_u32(vzip1q_u32(high02, high13));
        to[3] = vreinterpretq_u8_u32(vzip2q_u32(high02, high13));
    }

  private:
    // Rows FIRST, FIRST + 1, ... of x, four or what is left of them from one register.
    template <int FIRST, int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply_rows(I32 (&sums)[ROWS][VECTORS], const int8x16_t (&w)[VECTORS],
                                                    const uint32_t* x) {
        constexpr int COUNT = ROWS - FIRST < 4 ? ROWS - FIRST : 4;
        if constexpr (COUNT > 0) {
            multiply_lanes<FIRST, 0, COUNT>(sums, w, vreinterpretq_s8_u32(load_dwords<COUNT>(x + FIRST)));
            multiply_rows<FIRST + COUNT>(sums, w, x);
        }
    }

    template <int FIRST, int LANE, int COUNT, int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply_lanes(I32 (&sums)[ROWS][VECTORS], const int8x16_t (&w)[VECTORS],
                                                     int8x16_t x) {
        if constexpr (LANE < COUNT) {
            for (int v = 0; v < VECTORS; ++v) {
                int32x4_t& sum = sums[FIRST + LANE][v].v;
                sum = vdotq_laneq_s32(sum, w[v], x, LANE);
            }
            multiply_lanes<FIRST, LANE + 1, COUNT>(sums, w, x);
        }
    }

    template <int COUNT>
    static LLMKERN_INLINE_MEMBER uint32x4_t load_dwords(const uint32_t* p) {
        if constexpr (COUNT == 4) return vld1q_u32(p);
        if constexpr (COUNT == 1) return vld1q_dup_u32(p);
        const uint32x4_t two = vcombine_u32(vld1_u32(p), vdup_n_u32(0));
        if constexpr (COUNT == 2) return two;
        return vld1q_lane_u32(p + 2, two, 2);
    }
};

struct Tile4 : TileBase {
    static constexpr int COLUMNS = 32, UNIT = 8, OFFSET = 8;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t* codes, int64_t count) { even_then_odd(codes, count); }
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[4], int bytes, uint8_t* to) {
        uint8x16_t dwords[4];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 4; ++i) {
            vst1q_u8(to + 2 * i * STEP_BYTES, vandq_u8(dwords[i], vdupq_n_u8(15)));
            vst1q_u8(to + (2 * i + 1) * STEP_BYTES, vshrq_n_u8(dwords[i], 4));
        }
    }
};

struct Tile8 : TileBase {
    static constexpr int COLUMNS = 16, UNIT = 4, OFFSET = 0;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t*, int64_t) {}
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[4], int bytes, uint8_t* to) {
        uint8x16_t dwords[4];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 4; ++i) vst1q_u8(to + i * STEP_BYTES, dwords[i]);
    }
};

}  // namespace llmkern::LLMKERN_NS
