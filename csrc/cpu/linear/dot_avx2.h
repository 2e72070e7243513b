// Byte dot products for the integer driver (see integer.inl for the interface).
#pragma once

#include "cpu/simd/avx2.h"

#define LLMKERN_BYTE_DOT

namespace llmkern::avx2 {

struct I32 {
    __m256i v;
};

LLMKERN_INLINE I32 load_i32(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
LLMKERN_INLINE I32 operator*(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
LLMKERN_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }
LLMKERN_INLINE F32 permute(F32 x, const int32_t* index) { return {_mm256_permutevar8x32_ps(x.v, load_i32(index).v)}; }
LLMKERN_INLINE I32 permute(I32 x, const int32_t* index) {
    return {_mm256_permutevar8x32_epi32(x.v, load_i32(index).v)};
}
LLMKERN_INLINE I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x)}; }

LLMKERN_INLINE int32_t hsum(I32 x) {
    __m128i r = _mm_add_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    r = _mm_add_epi32(r, _mm_unpackhi_epi64(r, r));
    return _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 1)));
}

// 32 bytes: 64 columns, the even ones in the low nibbles. Sums of two products stay below 4 * 15 * 127 < 2^15.
struct Dot4 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 32, COLUMNS = 64, OFFSET = 8, ROWS = 2, X_ROWS = 2;
    static constexpr int column(int p) { return p < 32 ? 2 * p : 2 * (p - 32) + 1; }

    struct Weights {
        __m256i low, high;
    };
    static LLMKERN_INLINE_MEMBER Weights load(const uint8_t* p) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
    }
    static LLMKERN_INLINE_MEMBER I32 add(I32 sum, Weights w, const int8_t* x) {
        const __m256i* at = reinterpret_cast<const __m256i*>(x);
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, _mm256_loadu_si256(at)),
                                               _mm256_maddubs_epi16(w.high, _mm256_loadu_si256(at + 1)));
        return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
    }
};

// Unsigned times signed bytes would saturate in 16 bits.
struct Dot8 {
    static constexpr bool FAST = false;
};

struct Tile4 {
    static constexpr bool FAST = false;
};

struct Tile8 {
    static constexpr bool FAST = false;
};

}  // namespace llmkern::avx2
