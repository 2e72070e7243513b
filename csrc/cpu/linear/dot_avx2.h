// Byte dot products for the integer driver (see integer_fast.inl and integer_tile.inl for the interfaces).
#pragma once

#include "cpu/simd/avx2.h"

#define LLMKERN_BYTE_DOT

namespace llmkern::avx2 {

struct I32 {
    __m256i v;
};

LLMKERN_INLINE I32 load_i32(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
LLMKERN_INLINE void store_i32(int32_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
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

// 32 bytes: 32 columns. Unsigned times signed bytes would saturate in 16 bits, so the signs go to x, whose codes are
// never -128: sums of two products stay at or below 2 * 128 * 127 < 2^15.
struct Dot8 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 32, COLUMNS = 32, OFFSET = 0, ROWS = 2, X_ROWS = 2;
    static constexpr int column(int p) { return p; }

    struct Weights {
        __m256i codes, sizes;
    };
    static LLMKERN_INLINE_MEMBER Weights load(const uint8_t* p) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {codes, _mm256_abs_epi8(codes)};
    }
    static LLMKERN_INLINE_MEMBER I32 add(I32 sum, Weights w, const int8_t* x) {
        const __m256i signs = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), w.codes);
        const __m256i pairs = _mm256_maddubs_epi16(w.sizes, signs);
        return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
    }
};

// d[i] lane j = s[j] dword i: rows of dwords to columns.
LLMKERN_INLINE void transpose_dwords(const __m256i (&s)[8], __m256i (&d)[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(s[i], s[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(s[i], s[i + 1]);
    }
    // b[4 * q + c]: column c of each 128-bit lane, for rows 4 * q to 4 * q + 3.
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        d[c] = _mm256_permute2x128_si256(b[c], b[4 + c], 0x20);
        d[4 + c] = _mm256_permute2x128_si256(b[c], b[4 + c], 0x31);
    }
}

// sums + the products of w and x, two at a time. Written out because GCC 12, given intrinsics, first makes all products
// of a step and spills the sums, which takes two to three times as long.
LLMKERN_INLINE __m256i add_byte_products(__m256i sums, __m256i w, __m256i x) {
    __m256i products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(w), "x"(x));
    return sums;
}

// See integer_tile.inl. 6 rows of x by 2 registers of w take 12 sums, 2 registers, one for x and one for a product.
struct TileBase {
    static constexpr bool FAST = true;
    static constexpr int VECTORS = 2, X_ROWS = 6, BYTES = 32;
    static constexpr int STEP_BYTES = VECTORS * 32;

    static LLMKERN_INLINE_MEMBER __m256i load(const uint8_t* p) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    }
    static LLMKERN_INLINE_MEMBER void store(uint8_t* p, __m256i x) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(p), x);
    }

    // The first `bytes` bytes at each of the rows, zeros behind them, turned.
    static LLMKERN_INLINE_MEMBER void load_turned(const uint8_t* const (&rows)[8], int bytes, __m256i (&to)[8]) {
        __m256i from[8];
        if (bytes == BYTES) {
            for (int i = 0; i < 8; ++i) from[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i]));
        } else {
            alignas(32) uint8_t part[8][BYTES] = {};
            for (int i = 0; i < 8; ++i)
                for (int b = 0; b < bytes; ++b) part[i][b] = rows[i][b];
            for (int i = 0; i < 8; ++i) from[i] = load(part[i]);
        }
        transpose_dwords(from, to);
    }

    static LLMKERN_INLINE_MEMBER void shuffle(int8_t* codes, int64_t count, __m128i order) {
        const __m256i both = _mm256_broadcastsi128_si256(order);
        for (int64_t k = 0; k < count; k += 32) {
            __m256i* at = reinterpret_cast<__m256i*>(codes + k);
            _mm256_storeu_si256(at, _mm256_shuffle_epi8(_mm256_loadu_si256(at), both));
        }
    }
};

// A dword of a row is 8 columns: the even ones in its low nibbles, then the odd ones.
struct Tile4 : TileBase {
    static constexpr int COLUMNS = 64, STEP = 4, UNIT = 8, OFFSET = 8;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t* codes, int64_t count) {
        shuffle(codes, count, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    }
    static LLMKERN_INLINE_MEMBER void pack(const int8_t* codes, int64_t ld, int rows, int64_t steps, uint32_t* to) {
        for (int64_t s = 0; s < steps; ++s)
            for (int r = 0; r < rows; ++r) __builtin_memcpy(to + s * rows + r, codes + r * ld + s * STEP, 4);
    }
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[8], int bytes, uint8_t* to) {
        const __m256i mask = _mm256_set1_epi8(15);
        __m256i dwords[8];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 8; ++i) {
            store(to + 2 * i * STEP_BYTES, _mm256_and_si256(dwords[i], mask));
            store(to + (2 * i + 1) * STEP_BYTES, _mm256_and_si256(_mm256_srli_epi16(dwords[i], 4), mask));
        }
    }
    template <int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply(I32 (&sums)[ROWS][VECTORS], const uint8_t* tile, const uint32_t* x,
                                               int64_t steps) {
        constexpr int FIT = 8;  // sums of so many steps, each of two products, fit 16 bits: 8 * 2 * 15 * 127 < 2^15
        for (int64_t s0 = 0; s0 < steps; s0 += FIT) {
            __m256i pairs[ROWS][VECTORS];
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v) pairs[r][v] = _mm256_setzero_si256();
            for (int64_t s = s0; s < steps && s < s0 + FIT; ++s) {
                __m256i w[VECTORS];
                for (int v = 0; v < VECTORS; ++v) w[v] = load(tile + s * STEP_BYTES + v * 32);
                for (int r = 0; r < ROWS; ++r) {
                    const __m256i codes = _mm256_set1_epi32(static_cast<int>(x[s * ROWS + r]));
                    for (int v = 0; v < VECTORS; ++v) pairs[r][v] = add_byte_products(pairs[r][v], w[v], codes);
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v)
                    sums[r][v].v = _mm256_add_epi32(sums[r][v].v, _mm256_madd_epi16(pairs[r][v], _mm256_set1_epi16(1)));
        }
    }
};

// As 16-bit codes, because unsigned times signed bytes would saturate. Of four columns a step takes 0 and 2, the next
// 1 and 3.
struct Tile8 : TileBase {
    static constexpr int COLUMNS = 32, STEP = 2, UNIT = 4, OFFSET = 0;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t* codes, int64_t count) {
        shuffle(codes, count, _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    }
    static LLMKERN_INLINE_MEMBER void pack(const int8_t* codes, int64_t ld, int rows, int64_t steps, uint32_t* to) {
        for (int64_t s = 0; s < steps; ++s)
            for (int r = 0; r < rows; ++r) {
                const int8_t* from = codes + r * ld + s * STEP;
                to[s * rows + r] = static_cast<uint16_t>(from[0]) | static_cast<uint32_t>(from[1]) << 16;
            }
    }
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[8], int bytes, uint8_t* to) {
        __m256i dwords[8];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 8; ++i) {
            store(to + 2 * i * STEP_BYTES, _mm256_srai_epi16(_mm256_slli_epi16(dwords[i], 8), 8));
            store(to + (2 * i + 1) * STEP_BYTES, _mm256_srai_epi16(dwords[i], 8));
        }
    }
    template <int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply(I32 (&sums)[ROWS][VECTORS], const uint8_t* tile, const uint32_t* x,
                                               int64_t steps) {
        for (int64_t s = 0; s < steps; ++s) {
            __m256i w[VECTORS];
            for (int v = 0; v < VECTORS; ++v) w[v] = load(tile + s * STEP_BYTES + v * 32);
            for (int r = 0; r < ROWS; ++r) {
                const __m256i codes = _mm256_set1_epi32(static_cast<int>(x[s * ROWS + r]));
                for (int v = 0; v < VECTORS; ++v)
                    sums[r][v].v = _mm256_add_epi32(sums[r][v].v, _mm256_madd_epi16(w[v], codes));
            }
        }
    }
};

}  // namespace llmkern::avx2
