// F32 in NEON of AArch64: 4 lanes. See simd.h for the interface. Levels above that have the same lanes set LLMKERN_NS
// to their name first.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/simd.h"

#ifndef LLMKERN_NS
#define LLMKERN_NS neon_dotprod
#endif

namespace llmkern::LLMKERN_NS {

#include "cpu/simd/scalar.h"

struct F32 {
    static constexpr int WIDTH = 4;
    float32x4_t v;
};

struct Mask {
    uint32x4_t v;
};

LLMKERN_INLINE F32 zero() { return {vdupq_n_f32(0)}; }
LLMKERN_INLINE F32 set1(float x) { return {vdupq_n_f32(x)}; }
LLMKERN_INLINE F32 iota() {
    const float lanes[F32::WIDTH] = {0, 1, 2, 3};
    return {vld1q_f32(lanes)};
}

LLMKERN_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
LLMKERN_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
LLMKERN_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
LLMKERN_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator<(F32 a, F32 b) { return {vcltq_f32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator<=(F32 a, F32 b) { return {vcleq_f32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator>(F32 a, F32 b) { return {vcgtq_f32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator>=(F32 a, F32 b) { return {vcgeq_f32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator==(F32 a, F32 b) { return {vceqq_f32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator&(Mask a, Mask b) { return {vandq_u32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.v, b.v)}; }
LLMKERN_INLINE Mask operator~(Mask a) { return {vmvnq_u32(a.v)}; }
LLMKERN_INLINE F32 select(Mask mask, F32 yes, F32 no) { return {vbslq_f32(mask.v, yes.v, no.v)}; }
LLMKERN_INLINE bool any(Mask mask) { return vmaxvq_u32(mask.v) != 0; }
LLMKERN_INLINE Mask first_lanes(int n) { return iota() < set1(static_cast<float>(n)); }

LLMKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// fmin and fmax would return the NaN, fminnm and fmaxnm the number; neither is the second operand.
LLMKERN_INLINE F32 min(F32 a, F32 b) { return select(a < b, a, b); }
LLMKERN_INLINE F32 max(F32 a, F32 b) { return select(a > b, a, b); }
LLMKERN_INLINE F32 abs(F32 x) { return {vabsq_f32(x.v)}; }
LLMKERN_INLINE F32 sqrt(F32 x) { return {vsqrtq_f32(x.v)}; }
LLMKERN_INLINE F32 round_even(F32 x) { return {vrndnq_f32(x.v)}; }
LLMKERN_INLINE F32 scale2(F32 x, F32 n) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
    return {vmulq_f32(x.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
LLMKERN_INLINE float hsum(F32 x) { return vaddvq_f32(x.v); }
LLMKERN_INLINE float hmax(F32 x) { return vmaxvq_f32(x.v); }

LLMKERN_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
LLMKERN_INLINE void store(float* p, F32 x) { vst1q_f32(p, x.v); }
LLMKERN_INLINE F32 load_strided(const float* p, int64_t stride, int n = F32::WIDTH) {
    float lanes[F32::WIDTH] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
    return load(lanes);
}
LLMKERN_INLINE void store_strided(float* p, int64_t stride, F32 x, int n = F32::WIDTH) {
    float lanes[F32::WIDTH];
    store(lanes, x);
    for (int i = 0; i < n; ++i) p[i * stride] = lanes[i];
}
LLMKERN_INLINE F32 load_partial(const float* p, int n) { return load_strided(p, 1, n); }
LLMKERN_INLINE void store_partial(float* p, F32 x, int n) { store_strided(p, 1, x, n); }
LLMKERN_INLINE F32 gather(const float* p, const int32_t* index) {
    const float lanes[F32::WIDTH] = {p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
    return load(lanes);
}

// Four bytes, byte i in bits [8 * AT, 8 * AT + 8) of lane i, zeros elsewhere: an index beyond a table gives 0.
template <int AT>
LLMKERN_INLINE uint32x4_t spread_bytes(const void* p) {
    uint32_t word, lanes[4];
    __builtin_memcpy(&word, p, sizeof word);
    for (uint32_t i = 0; i < 4; ++i) lanes[i] = ~(0xffu << 8 * AT) | i << 8 * AT;
    const uint8x16_t bytes = vreinterpretq_u8_u32(vsetq_lane_u32(word, vdupq_n_u32(0), 0));
    return vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vreinterpretq_u8_u32(vld1q_u32(lanes))));
}

// As the upper byte of a lane the code has its sign, and the conversion divides by 2^24.
LLMKERN_INLINE F32 load_i8(const int8_t* p) { return {vcvtq_n_f32_s32(vreinterpretq_s32_u32(spread_bytes<3>(p)), 24)}; }
LLMKERN_INLINE F32 load_bf16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
LLMKERN_INLINE F32 load_f16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
LLMKERN_INLINE void store_bf16(uint16_t* p, F32 x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32((x == x).v, rounded, nan), 16));
}
LLMKERN_INLINE void store_f16(uint16_t* p, F32 x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }
LLMKERN_INLINE void store_i8(int8_t* p, F32 x) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x.v));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    __builtin_memcpy(p, &four, sizeof four);
}
LLMKERN_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
LLMKERN_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

#include "cpu/simd/memory.h"

// See simd.h.
struct NibbleGrid {
    F32 scale = set1(0), zero = set1(0);

    LLMKERN_INLINE_MEMBER void set(float s, float z) {
        scale = set1(s);
        zero = set1(8 + z);
    }
    LLMKERN_INLINE_MEMBER void load(const uint8_t* p, F32& even, F32& odd) const {
        const uint32x4_t bytes = spread_bytes<0>(p);
        const F32 low = {vcvtq_f32_u32(vandq_u32(bytes, vdupq_n_u32(15)))};
        const F32 high = {vcvtq_f32_u32(vshrq_n_u32(bytes, 4))};
        even = (low - zero) * scale;
        odd = (high - zero) * scale;
    }
};

}  // namespace llmkern::LLMKERN_NS
