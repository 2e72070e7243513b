// Products of byte matrices for the integer driver (see integer_tile.inl for the interface); along rows, where two rows
// of x would be needed, the dot products of dot_neon.h.
#pragma once

#include "cpu/simd/neon_i8mm.h"

#include "cpu/linear/dot_neon.h"

#define LLMKERN_TURNED_SUMS

namespace llmkern::neon_i8mm {

// See integer_tile.inl. smmla multiplies two rows of x by two of w, 8 columns each, so that two steps are one here:
//
//   x of two steps    m0: 8 bytes | m1: 8 bytes        (a last row without another: alone)
//   w of two steps    first step, vector v: w0: 8 bytes | w1: 8 bytes        second step: w2 | w3
//   sums, turned      m0w0 m0w1 m1w0 m1w1 in the place of m0's,  m0w2 m0w3 m1w2 m1w3 in the place of m1's
//
// 6 rows of x by 16 of w take 24 sums, 3 registers for x and one or two for w, for 11 loads per 24 products.
struct TileBase {
    static constexpr bool FAST = true;
    static constexpr int VECTORS = 4, X_ROWS = 6, BYTES = 16, STEP = 4, UNIT = 8;
    static constexpr int STEP_BYTES = VECTORS * 16;

    static LLMKERN_INLINE_MEMBER void pack(const int8_t* codes, int64_t ld, int rows, int64_t steps, uint32_t* to) {
        for (int64_t s = 0; s < steps; s += 2)
            for (int r = 0; r < rows; ++r) __builtin_memcpy(to + s * rows + 2 * r, codes + r * ld + s * STEP, 8);
    }

    // From the driver's order of sums to that of smmla, or back.
    template <int ROWS>
    static LLMKERN_INLINE_MEMBER void turn(I32 (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 8
        for (int r = 0; r + 1 < ROWS; r += 2)
            for (int v = 0; v < VECTORS; ++v) {
                const int64x2_t a = vreinterpretq_s64_s32(sums[r][v].v), b = vreinterpretq_s64_s32(sums[r + 1][v].v);
                sums[r][v].v = vreinterpretq_s32_s64(vzip1q_s64(a, b));
                sums[r + 1][v].v = vreinterpretq_s32_s64(vzip2q_s64(a, b));
            }
    }

    template <int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply(I32 (&sums)[ROWS][VECTORS], const uint8_t* tile, const uint32_t* x,
                                               int64_t steps) {
        constexpr int PAIRS = ROWS / 2;
        int32x4_t alone[VECTORS][2];  // of the last row, each half of a lane pair apart
        for (int v = 0; v < VECTORS; ++v) alone[v][0] = alone[v][1] = vdupq_n_s32(0);
        for (int64_t s = 0; s < steps; s += 2) {
            const uint32_t* from = x + s * ROWS;
            int8x16_t pairs[PAIRS + 1];
            for (int i = 0; i < PAIRS; ++i) pairs[i] = vreinterpretq_s8_u32(vld1q_u32(from + 4 * i));
            if (ROWS % 2) {
                const uint32x2_t last = vld1_u32(from + 4 * PAIRS);
                pairs[PAIRS] = vreinterpretq_s8_u32(vcombine_u32(last, last));
            }
            for (int v = 0; v < VECTORS; ++v) {
                // Else the compiler loads all of w first, and has no registers left for sums.
                __asm__ volatile("" ::: "memory");
                for (int half = 0; half < 2; ++half) {
                    const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(tile + (s + half) * STEP_BYTES + v * 16));
#pragma GCC unroll 4
                    for (int i = 0; i < PAIRS; ++i) {
                        int32x4_t& sum = sums[2 * i + half][v].v;
                        sum = vmmlaq_s32(sum, pairs[i], w);
                    }
                    if (ROWS % 2) alone[v][half] = vdotq_s32(alone[v][half], pairs[PAIRS], w);
                }
            }
        }
        if (ROWS % 2)
            for (int v = 0; v < VECTORS; ++v) {
                int32x4_t& sum = sums[ROWS - 1][v].v;
                sum = vaddq_s32(sum, vpaddq_s32(alone[v][0], alone[v][1]));
            }
    }

  protected:
    // Two steps of four rows, of which rows[i] holds 8 bytes each, the AT-th, go to `to`.
    template <int AT>
    static LLMKERN_INLINE_MEMBER void store_steps(const uint64x2_t (&rows)[4], uint8_t* to) {
        for (int half = 0; half < 2; ++half) {
            const uint64x2_t a = rows[2 * half], b = rows[2 * half + 1];
            vst1q_u8(to + half * STEP_BYTES, vreinterpretq_u8_u64(AT == 0 ? vzip1q_u64(a, b) : vzip2q_u64(a, b)));
        }
    }
};

struct Tile4 : TileBase {
    static constexpr int COLUMNS = 32, OFFSET = 8;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t* codes, int64_t count) { even_then_odd(codes, count); }
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[4], int bytes, uint8_t* to) {
        uint64x2_t first[4], second[4];  // each dword's low nibbles, then its high ones
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t from = load_bytes(rows[i], bytes);
            const uint32x4_t low = vreinterpretq_u32_u8(vandq_u8(from, vdupq_n_u8(15)));
            const uint32x4_t high = vreinterpretq_u32_u8(vshrq_n_u8(from, 4));
            first[i] = vreinterpretq_u64_u32(vzip1q_u32(low, high));
            second[i] = vreinterpretq_u64_u32(vzip2q_u32(low, high));
        }
        store_steps<0>(first, to);
        store_steps<1>(first, to + 2 * STEP_BYTES);
        store_steps<0>(second, to + 4 * STEP_BYTES);
        store_steps<1>(second, to + 6 * STEP_BYTES);
    }
};

struct Tile8 : TileBase {
    static constexpr int COLUMNS = 16, OFFSET = 0;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t*, int64_t) {}
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[4], int bytes, uint8_t* to) {
        uint64x2_t from[4];
        for (int i = 0; i < 4; ++i) from[i] = vreinterpretq_u64_u8(load_bytes(rows[i], bytes));
        store_steps<0>(from, to);
        store_steps<1>(from, to + 2 * STEP_BYTES);
    }
};

}  // namespace llmkern::neon_i8mm
