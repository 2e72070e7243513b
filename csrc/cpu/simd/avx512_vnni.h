// F32 in AVX-512 (F, BW, DQ, VL, VNNI, VBMI, VBMI2): 16 lanes. See simd.h for the interface. Levels above that
// have the same lanes set LLMKERN_NS to their name first.
#pragma once

#include <immintrin.h>

#include "cpu/simd/simd.h"

#ifndef LLMKERN_NS
#define LLMKERN_NS avx512_vnni
#endif

namespace llmkern::LLMKERN_NS {

#include "cpu/simd/scalar.h"

struct F32 {
    static constexpr int WIDTH = 16;
    __m512 v;
};

struct Mask {
    __mmask16 v;
};

LLMKERN_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
LLMKERN_INLINE F32 set1(float x) { return {_mm512_set1_ps(x)}; }
LLMKERN_INLINE F32 iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

LLMKERN_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
LLMKERN_INLINE Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LLMKERN_INLINE Mask operator<=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
LLMKERN_INLINE Mask operator>(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
LLMKERN_INLINE Mask operator>=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
LLMKERN_INLINE Mask operator==(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
LLMKERN_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
LLMKERN_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
LLMKERN_INLINE Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.v)}; }
LLMKERN_INLINE F32 select(Mask mask, F32 yes, F32 no) { return {_mm512_mask_blend_ps(mask.v, no.v, yes.v)}; }
LLMKERN_INLINE bool any(Mask mask) { return mask.v != 0; }
LLMKERN_INLINE Mask first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }

LLMKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LLMKERN_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 abs(F32 x) { return {_mm512_abs_ps(x.v)}; }
LLMKERN_INLINE F32 sqrt(F32 x) { return {_mm512_sqrt_ps(x.v)}; }
LLMKERN_INLINE F32 round_even(F32 x) {
    return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LLMKERN_INLINE F32 scale2(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
LLMKERN_INLINE float hsum(F32 x) { return _mm512_reduce_add_ps(x.v); }
LLMKERN_INLINE float hmax(F32 x) { return _mm512_reduce_max_ps(x.v); }

LLMKERN_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LLMKERN_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
LLMKERN_INLINE F32 load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n).v, p)}; }
LLMKERN_INLINE void store_partial(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n).v, x.v); }
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
LLMKERN_INLINE F32 gather(const float* p, const int32_t* index) {
    return {_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4)};
}
LLMKERN_INLINE F32 load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
LLMKERN_INLINE F32 load_bf16(const uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
LLMKERN_INLINE F32 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LLMKERN_INLINE void store_bf16(uint16_t* p, F32 x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}
LLMKERN_INLINE void store_f16(uint16_t* p, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
LLMKERN_INLINE void store_i8(int8_t* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
LLMKERN_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
LLMKERN_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#include "cpu/simd/memory.h"

// See simd.h. The 16 values stand in one register, and a permutation looks them up: it reads the low 4 bits of its
// index, so the low nibble of a byte needs no mask.
struct NibbleGrid {
    F32 values = set1(0);

    LLMKERN_INLINE_MEMBER void set(float s, float z) { values = (iota() - set1(8 + z)) * set1(s); }
    LLMKERN_INLINE_MEMBER void load(const uint8_t* p, F32& even, F32& odd) const {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        even = {_mm512_permutexvar_ps(bytes, values.v)};
        odd = {_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values.v)};
    }
};

}  // namespace llmkern::LLMKERN_NS
