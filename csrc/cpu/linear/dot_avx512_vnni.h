// Byte dot products for the integer driver (see integer.inl for the interface).
#pragma once

#include "cpu/simd/avx512_vnni.h"

#define LLMKERN_BYTE_DOT

namespace llmkern::avx512_vnni {

struct I32 {
    __m512i v;
};

LLMKERN_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LLMKERN_INLINE I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LLMKERN_INLINE F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
LLMKERN_INLINE F32 permute(F32 x, const int32_t* index) { return {_mm512_permutexvar_ps(load_i32(index).v, x.v)}; }
LLMKERN_INLINE I32 permute(I32 x, const int32_t* index) { return {_mm512_permutexvar_epi32(load_i32(index).v, x.v)}; }
LLMKERN_INLINE I32 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
LLMKERN_INLINE int32_t hsum(I32 x) { return _mm512_reduce_add_epi32(x.v); }

// Adds to each int32 lane of `sum` its four products u * s. GCC 12 copies the accumulator before and after the
// intrinsic, which doubles the instructions of the inner loop.
LLMKERN_INLINE void add_products(__m512i& sum, __m512i u, __m512i s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
}

// 64 bytes: 128 columns, the even ones in the low nibbles.
struct Dot4 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 64, COLUMNS = 128, OFFSET = 8, ROWS = 4, X_ROWS = 4;
    static constexpr int column(int p) { return p < 64 ? 2 * p : 2 * (p - 64) + 1; }

    struct Weights {
        __m512i low, high;
    };
    static LLMKERN_INLINE_MEMBER Weights load(const uint8_t* p) {
        const __m512i bytes = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
        return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
    }
    static LLMKERN_INLINE_MEMBER I32 add(I32 sum, Weights w, const int8_t* x) {
        add_products(sum.v, w.low, _mm512_loadu_si512(x));
        add_products(sum.v, w.high, _mm512_loadu_si512(x + 64));
        return sum;
    }
};

// 64 columns; the codes are made unsigned.
struct Dot8 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 64, COLUMNS = 64, OFFSET = 128, ROWS = 4, X_ROWS = 4;
    static constexpr int column(int p) { return p; }

    struct Weights {
        __m512i codes;
    };
    static LLMKERN_INLINE_MEMBER Weights load(const uint8_t* p) {
        return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
    }
    static LLMKERN_INLINE_MEMBER I32 add(I32 sum, Weights w, const int8_t* x) {
        add_products(sum.v, w.codes, _mm512_loadu_si512(x));
        return sum;
    }
};

}  // namespace llmkern::avx512_vnni
