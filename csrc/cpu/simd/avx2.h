// F32 in AVX2 with FMA and F16C: 8 lanes. See simd.h for the interface.
#pragma once

#include <immintrin.h>

#include "cpu/simd/simd.h"

#define LLMKERN_NS avx2

namespace llmkern::avx2 {

#include "cpu/simd/scalar.h"

struct F32 {
    static constexpr int WIDTH = 8;
    __m256 v;
};

struct Mask {
    __m256 v;
};

LLMKERN_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
LLMKERN_INLINE F32 set1(float x) { return {_mm256_set1_ps(x)}; }
LLMKERN_INLINE F32 iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }

LLMKERN_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
LLMKERN_INLINE Mask operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
LLMKERN_INLINE Mask operator<=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
LLMKERN_INLINE Mask operator>(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
LLMKERN_INLINE Mask operator>=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
LLMKERN_INLINE Mask operator==(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
LLMKERN_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
LLMKERN_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
LLMKERN_INLINE Mask operator~(Mask a) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
LLMKERN_INLINE F32 select(Mask mask, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, mask.v)}; }
LLMKERN_INLINE bool any(Mask mask) { return _mm256_movemask_ps(mask.v) != 0; }
LLMKERN_INLINE Mask first_lanes(int n) { return iota() < set1(static_cast<float>(n)); }

LLMKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LLMKERN_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
LLMKERN_INLINE F32 abs(F32 x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
LLMKERN_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.v)}; }
LLMKERN_INLINE F32 round_even(F32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
LLMKERN_INLINE F32 scale2(F32 x, F32 n) {
    // Adding 1.5 * 2^23 leaves n + 127, the exponent of 2^n, in the low bits.
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(n.v, _mm256_set1_ps(0x1.8p23f + 127)));
    return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)))};
}
LLMKERN_INLINE float hsum(F32 x) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
LLMKERN_INLINE float hmax(F32 x) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

LLMKERN_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
LLMKERN_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
LLMKERN_INLINE F32 load_partial(const float* p, int n) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(first_lanes(n).v))};
}
LLMKERN_INLINE void store_partial(float* p, F32 x, int n) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n).v), x.v);
}
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
    return {_mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4)};
}
LLMKERN_INLINE F32 load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
LLMKERN_INLINE F32 load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
LLMKERN_INLINE F32 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LLMKERN_INLINE void store_bf16(uint16_t* p, F32 x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LLMKERN_INLINE void store_f16(uint16_t* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
LLMKERN_INLINE void store_i8(int8_t* p, F32 x) {
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.v), _mm256_setzero_si256()), 0x08);
    const __m128i low = _mm256_castsi256_si128(words);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, low));
}
LLMKERN_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
LLMKERN_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#include "cpu/simd/memory.h"

// See simd.h.
struct NibbleGrid {
    F32 scale = set1(0), zero = set1(0);

    LLMKERN_INLINE_MEMBER void set(float s, float z) {
        scale = set1(s);
        zero = set1(8 + z);
    }
    LLMKERN_INLINE_MEMBER void load(const uint8_t* p, F32& even, F32& odd) const {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        const F32 low = {_mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)))};
        const F32 high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4))};
        even = (low - zero) * scale;
        odd = (high - zero) * scale;
    }
};

}  // namespace llmkern::avx2
