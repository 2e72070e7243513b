// What the NEON levels share of the integer driver: int32 vectors, and dot products along rows (integer_quad.inl).
#pragma once

#define LLMKERN_BYTE_DOT
#define LLMKERN_QUAD_DOT

namespace llmkern::LLMKERN_NS {

struct I32 {
    int32x4_t v;
};

LLMKERN_INLINE I32 load_i32(const int32_t* p) { return {vld1q_s32(p)}; }
LLMKERN_INLINE void store_i32(int32_t* p, I32 x) { vst1q_s32(p, x.v); }
LLMKERN_INLINE I32 operator+(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
LLMKERN_INLINE I32 operator*(I32 a, I32 b) { return {vmulq_s32(a.v, b.v)}; }
LLMKERN_INLINE F32 to_float(I32 x) { return {vcvtq_f32_s32(x.v)}; }
LLMKERN_INLINE I32 set1_i32(int32_t x) { return {vdupq_n_s32(x)}; }

// Lane i: the sum of row i.
LLMKERN_INLINE I32 sums_of_rows(const I32 (&rows)[4]) {
    return {vpaddq_s32(vpaddq_s32(rows[0].v, rows[1].v), vpaddq_s32(rows[2].v, rows[3].v))};
}

// 16 bytes: 32 columns, the even ones in the low nibbles.
struct Dot4 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 16, COLUMNS = 32, PARTS = 2, OFFSET = 8;

    static LLMKERN_INLINE_MEMBER void load(const uint8_t* p, int8x16_t (&codes)[PARTS]) {
        const uint8x16_t bytes = vld1q_u8(p);
        codes[0] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
        codes[1] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    }
    static LLMKERN_INLINE_MEMBER void arrange(const int8_t* from, int8_t* to) {
        const int8x16x2_t both = vld2q_s8(from);
        vst1q_s8(to, both.val[0]);
        vst1q_s8(to + 16, both.val[1]);
    }
};

struct Dot8 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 16, COLUMNS = 16, PARTS = 1, OFFSET = 0;

    static LLMKERN_INLINE_MEMBER void load(const uint8_t* p, int8x16_t (&codes)[PARTS]) {
        codes[0] = vreinterpretq_s8_u8(vld1q_u8(p));
    }
    static LLMKERN_INLINE_MEMBER void arrange(const int8_t* from, int8_t* to) { vst1q_s8(to, vld1q_s8(from)); }
};

// The first `bytes` of 16 bytes, zeros behind them.
LLMKERN_INLINE uint8x16_t load_bytes(const uint8_t* p, int bytes) {
    if (bytes == 16) return vld1q_u8(p);
    uint8_t part[16] = {};
    for (int b = 0; b < bytes; ++b) part[b] = p[b];
    return vld1q_u8(part);
}

// Tile4's order of x: a dword of a row is 8 columns, the even ones in its low nibbles, then the odd ones.
LLMKERN_INLINE void even_then_odd(int8_t* codes, int64_t count) {
    const uint8_t order[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    for (int64_t k = 0; k < count; k += 16) vst1q_s8(codes + k, vqtbl1q_s8(vld1q_s8(codes + k), vld1q_u8(order)));
}

}  // namespace llmkern::LLMKERN_NS
