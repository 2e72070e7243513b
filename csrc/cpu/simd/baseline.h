// F32 in GCC vector extensions: SSE2 on x86-64, NEON on aarch64. See simd.h for the interface.
#pragma once

#include "cpu/simd/simd.h"

#define LLMKERN_NS baseline

namespace llmkern::baseline {

#include "cpu/simd/scalar.h"

struct F32 {
    static constexpr int WIDTH = 4;
    typedef float Native __attribute__((vector_size(16)));
    Native v;
};

struct Mask {
    typedef int32_t Native __attribute__((vector_size(16)));
    Native v;
};

LLMKERN_INLINE F32 zero() { return {F32::Native{}}; }
LLMKERN_INLINE F32 set1(float x) { return {F32::Native{x, x, x, x}}; }
LLMKERN_INLINE F32 iota() { return {F32::Native{0, 1, 2, 3}}; }

LLMKERN_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
LLMKERN_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
LLMKERN_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
LLMKERN_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
LLMKERN_INLINE Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
LLMKERN_INLINE Mask operator<=(F32 a, F32 b) { return {a.v <= b.v}; }
LLMKERN_INLINE Mask operator>(F32 a, F32 b) { return {a.v > b.v}; }
LLMKERN_INLINE Mask operator>=(F32 a, F32 b) { return {a.v >= b.v}; }
LLMKERN_INLINE Mask operator==(F32 a, F32 b) { return {a.v == b.v}; }
LLMKERN_INLINE Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
LLMKERN_INLINE Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
LLMKERN_INLINE Mask operator~(Mask a) { return {~a.v}; }
LLMKERN_INLINE F32 select(Mask mask, F32 yes, F32 no) { return {mask.v ? yes.v : no.v}; }
LLMKERN_INLINE bool any(Mask mask) { return (mask.v[0] | mask.v[1] | mask.v[2] | mask.v[3]) != 0; }
LLMKERN_INLINE Mask first_lanes(int n) { return iota() < set1(static_cast<float>(n)); }

LLMKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
LLMKERN_INLINE F32 min(F32 a, F32 b) { return select(a < b, a, b); }
LLMKERN_INLINE F32 max(F32 a, F32 b) { return select(a > b, a, b); }
LLMKERN_INLINE F32 abs(F32 x) { return {(F32::Native)((Mask::Native)x.v & 0x7fffffff)}; }
LLMKERN_INLINE F32 sqrt(F32 x) {
    F32 r;
    for (int i = 0; i < F32::WIDTH; ++i) r.v[i] = __builtin_sqrtf(x.v[i]);
    return r;
}
LLMKERN_INLINE F32 round_even(F32 x) {
    // Adding 1.5 * 2^23 leaves no bits below 1. From 2^22 on x is kept: the solver clamps long before that.
    const F32 magic = set1(0x1.8p23f);
    return select(abs(x) < set1(0x1p22f), (x + magic) - magic, x);
}
LLMKERN_INLINE F32 scale2(F32 x, F32 n) {
    // Adding 1.5 * 2^23 leaves n + 127, the exponent of 2^n, in the low bits.
    const F32 bits = n + set1(0x1.8p23f + 127);
    return {x.v * (F32::Native)((Mask::Native)bits.v << 23)};
}
LLMKERN_INLINE float hsum(F32 x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
LLMKERN_INLINE float hmax(F32 x) {
    float r = x.v[0];
    for (int i = 1; i < F32::WIDTH; ++i) r = x.v[i] > r ? x.v[i] : r;
    return r;
}

LLMKERN_INLINE F32 load(const float* p) {
    F32 r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
}
LLMKERN_INLINE void store(float* p, F32 x) { __builtin_memcpy(p, &x.v, sizeof x.v); }
LLMKERN_INLINE F32 load_strided(const float* p, int64_t stride, int n = F32::WIDTH) {
    F32 r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = p[i * stride];
    return r;
}
LLMKERN_INLINE void store_strided(float* p, int64_t stride, F32 x, int n = F32::WIDTH) {
    for (int i = 0; i < n; ++i) p[i * stride] = x.v[i];
}
LLMKERN_INLINE F32 load_partial(const float* p, int n) { return load_strided(p, 1, n); }
LLMKERN_INLINE void store_partial(float* p, F32 x, int n) { store_strided(p, 1, x, n); }
LLMKERN_INLINE F32 gather(const float* p, const int32_t* index) {
    return {F32::Native{p[index[0]], p[index[1]], p[index[2]], p[index[3]]}};
}
LLMKERN_INLINE F32 load_i8(const int8_t* p) {
    return {F32::Native{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                        static_cast<float>(p[3])}};
}
LLMKERN_INLINE F32 load_bf16(const uint16_t* p) {
    return {F32::Native{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])}};
}
LLMKERN_INLINE F32 load_f16(const uint16_t* p) {
    return {F32::Native{from_f16(p[0]), from_f16(p[1]), from_f16(p[2]), from_f16(p[3])}};
}
LLMKERN_INLINE void store_bf16(uint16_t* p, F32 x) {
    for (int i = 0; i < F32::WIDTH; ++i) p[i] = to_bf16(x.v[i]);
}
LLMKERN_INLINE void store_f16(uint16_t* p, F32 x) {
    for (int i = 0; i < F32::WIDTH; ++i) p[i] = to_f16(x.v[i]);
}
LLMKERN_INLINE void store_i8(int8_t* p, F32 x) {
    for (int i = 0; i < F32::WIDTH; ++i) p[i] = static_cast<int8_t>(static_cast<int32_t>(x.v[i]));
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
        F32 low, high;
        for (int i = 0; i < F32::WIDTH; ++i) {
            low.v[i] = static_cast<float>(p[i] & 15);
            high.v[i] = static_cast<float>(p[i] >> 4);
        }
        even = (low - zero) * scale;
        odd = (high - zero) * scale;
    }
};

}  // namespace llmkern::baseline
