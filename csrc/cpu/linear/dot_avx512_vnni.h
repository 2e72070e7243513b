// Byte dot products for the integer driver (see integer_quad_wide.inl and integer_tile.inl for the interfaces).
#pragma once

#include "cpu/simd/avx512_vnni.h"
#include "cpu/simd/products.h"

#define LLMKERN_BYTE_DOT
#define LLMKERN_WIDE_QUADS

namespace llmkern::LLMKERN_NS {

struct I32 {
    __m512i v;
};

LLMKERN_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LLMKERN_INLINE void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
LLMKERN_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LLMKERN_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LLMKERN_INLINE I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LLMKERN_INLINE F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
LLMKERN_INLINE I32 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
LLMKERN_INLINE int32_t hsum(I32 x) { return _mm512_reduce_add_epi32(x.v); }

// d[i] lane j = s[j] dword i: rows of dwords to columns.
LLMKERN_INLINE void transpose_dwords(const __m512i (&s)[16], __m512i (&d)[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(s[i], s[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(s[i], s[i + 1]);
    }
    // b[4 * q + c]: column c of each 128-bit lane, for rows 4 * q to 4 * q + 3.
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44);  // lanes 0 1 | 0 1
        const __m512i high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
        d[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);  // lane 0 of each
        d[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        d[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        d[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

// ---- few rows of x: registers of four 128-bit parts, see integer_quad_wide.inl ----

// p + step, now: GCC would keep the distances of all that is read in registers, of which there are not as many.
LLMKERN_INLINE const uint8_t* next_address(const uint8_t* p, int64_t step) {
    p += step;
    __asm__("" : "+r"(p));
    return p;
}

// `count` bytes, 1 to 63, and zeros up to 64.
LLMKERN_INLINE void copy_part(const uint8_t* from, int64_t count, uint8_t* to) {
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8((__mmask64{1} << count) - 1, from));
}

LLMKERN_INLINE F32 as_floats(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
LLMKERN_INLINE I32 as_dwords(F32 x) { return {_mm512_castps_si512(x.v)}; }

// The parts of a and b in the order of `PARTS`, two bits each: two of a's, then two of b's.
template <int PARTS>
LLMKERN_INLINE I32 shuffle_parts(I32 a, I32 b) {
    return {_mm512_shuffle_i32x4(a.v, b.v, PARTS)};
}
template <int PARTS>
LLMKERN_INLINE F32 shuffle_parts(F32 a, F32 b) {
    return as_floats(shuffle_parts<PARTS>(as_dwords(a), as_dwords(b)));
}

LLMKERN_INLINE I32 load_in_first_lane(const int32_t* p) { return {load_dword(p)}; }
LLMKERN_INLINE I32 load_in_first_part(const int32_t* p) {
    return {_mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LLMKERN_INLINE I32 load_in_parts(const int32_t* p) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// Four values in parts 0 and 1, the next four in parts 2 and 3.
LLMKERN_INLINE I32 load_in_halves(const int32_t* p) {
    const I32 both{_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    return shuffle_parts<0x50>(both, both);
}
LLMKERN_INLINE F32 load_in_parts(const float* p) {
    return as_floats(load_in_parts(reinterpret_cast<const int32_t*>(p)));
}
LLMKERN_INLINE F32 load_in_halves(const float* p) {
    return as_floats(load_in_halves(reinterpret_cast<const int32_t*>(p)));
}

// Lane i of what is returned: lane index[i] of x.
LLMKERN_INLINE I32 permute(I32 x, I32 index) { return {_mm512_permutexvar_epi32(index.v, x.v)}; }
LLMKERN_INLINE F32 permute(F32 x, I32 index) { return {_mm512_permutexvar_ps(index.v, x.v)}; }

// The group of each lane, of 16 or 8 groups.
LLMKERN_INLINE I32 lane_groups(int64_t groups) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {groups == 16 ? lanes : _mm512_srli_epi32(lanes, 1)};
}

// Values at base[index] in the lanes of `some`, zeros in the others; those AHEAD bytes further are asked for.
template <int64_t AHEAD>
LLMKERN_INLINE F32 load_stored(const void* base, DType dtype, int64_t index, Mask some) {
    if (dtype == DType::F32) {
        const float* p = static_cast<const float*>(base) + index;
        prefetch(p + AHEAD / sizeof *p);
        return {_mm512_maskz_loadu_ps(some.v, p)};
    }
    const uint16_t* p = static_cast<const uint16_t*>(base) + index;
    prefetch(p + AHEAD / sizeof *p);
    const __m256i halves = _mm256_maskz_loadu_epi16(some.v, p);
    if (dtype == DType::F16) return {_mm512_cvtph_ps(halves)};
    return as_floats({_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)});
}
template <int64_t AHEAD>
LLMKERN_INLINE I32 load_stored(const int8_t* p, Mask some) {
    prefetch(p + AHEAD);
    return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some.v, p))};
}

// Of every part: lanes 0 and 1 of a and b, or lanes 2 and 3, taken in turns; in pairs of lanes.
LLMKERN_INLINE I32 low_lanes(I32 a, I32 b) { return {_mm512_unpacklo_epi32(a.v, b.v)}; }
LLMKERN_INLINE I32 high_lanes(I32 a, I32 b) { return {_mm512_unpackhi_epi32(a.v, b.v)}; }
LLMKERN_INLINE I32 low_pairs(I32 a, I32 b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
LLMKERN_INLINE I32 high_pairs(I32 a, I32 b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }
LLMKERN_INLINE F32 low_lanes(F32 a, F32 b) { return as_floats(low_lanes(as_dwords(a), as_dwords(b))); }
LLMKERN_INLINE F32 high_lanes(F32 a, F32 b) { return as_floats(high_lanes(as_dwords(a), as_dwords(b))); }
LLMKERN_INLINE F32 low_pairs(F32 a, F32 b) { return as_floats(low_pairs(as_dwords(a), as_dwords(b))); }
LLMKERN_INLINE F32 high_pairs(F32 a, F32 b) { return as_floats(high_pairs(as_dwords(a), as_dwords(b))); }

// Lane r of a part: the sum of that part of rows[r].
template <class Vector>
LLMKERN_INLINE Vector sums_of_rows(const Vector (&rows)[4]) {
    const Vector a = low_lanes(rows[0], rows[1]) + high_lanes(rows[0], rows[1]);
    const Vector b = low_lanes(rows[2], rows[3]) + high_lanes(rows[2], rows[3]);
    return low_pairs(a, b) + high_pairs(a, b);
}

// Part i: the sum of the parts of x[i].
template <class Vector>
LLMKERN_INLINE Vector sums_of_parts(const Vector (&x)[4]) {
    const Vector a = shuffle_parts<0x44>(x[0], x[1]) + shuffle_parts<0xee>(x[0], x[1]);
    const Vector b = shuffle_parts<0x44>(x[2], x[3]) + shuffle_parts<0xee>(x[2], x[3]);
    return shuffle_parts<0x88>(a, b) + shuffle_parts<0xdd>(a, b);
}

// to[i][r] = rows[r][i] for four rows of `count` dwords, `ld` apart; whole vectors are read and written.
LLMKERN_INLINE void interleave_rows(const int32_t* rows, int64_t ld, int64_t count, int32_t* to) {
    for (int64_t i = 0; i < count; i += 16, to += 64) {
        __m512i row[4];
        for (int r = 0; r < 4; ++r) row[r] = _mm512_loadu_si512(rows + r * ld + i);
        const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
        const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
        // Part p of quads[j] is column 4 * p + j.
        const I32 quads[4] = {{_mm512_unpacklo_epi64(low01, low23)},
                              {_mm512_unpackhi_epi64(low01, low23)},
                              {_mm512_unpacklo_epi64(high01, high23)},
                              {_mm512_unpackhi_epi64(high01, high23)}};
        const I32 a = shuffle_parts<0x44>(quads[0], quads[1]), b = shuffle_parts<0xee>(quads[0], quads[1]);
        const I32 c = shuffle_parts<0x44>(quads[2], quads[3]), d = shuffle_parts<0xee>(quads[2], quads[3]);
        store_i32(to, shuffle_parts<0x88>(a, c));
        store_i32(to + 16, shuffle_parts<0xdd>(a, c));
        store_i32(to + 32, shuffle_parts<0x88>(b, d));
        store_i32(to + 48, shuffle_parts<0xdd>(b, d));
    }
}

// x[i] lane j becomes x[j] lane i.
LLMKERN_INLINE void turn(F32 (&x)[16]) {
    __m512i rows[16], columns[16];
    for (int i = 0; i < 16; ++i) rows[i] = as_dwords(x[i]).v;
    transpose_dwords(rows, columns);
    for (int i = 0; i < 16; ++i) x[i] = as_floats({columns[i]});
}

// The sums of four codes of x each.
LLMKERN_INLINE I32 code_sums(const int8_t* codes) {
    return {add_products(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(codes))};
}

// 64 bytes: 128 columns, the even ones in the low nibbles.
struct Dot4 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 64, COLUMNS = 128, OFFSET = 8;
    static constexpr int64_t STREAM_ROWS = 8;

    struct Weights {
        __m512i low, high;
    };
    static LLMKERN_INLINE_MEMBER Weights load(const uint8_t* p) {
        const __m512i bytes = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
        return {_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
    }
    static LLMKERN_INLINE_MEMBER I32 add(I32 sum, Weights w, const int8_t* x) {
        sum.v = add_products(sum.v, w.low, _mm512_loadu_si512(x));
        sum.v = add_products(sum.v, w.high, _mm512_loadu_si512(x + 64));
        return sum;
    }
    static LLMKERN_INLINE_MEMBER I32 sums(const int8_t* x) { return code_sums(x) + code_sums(x + 64); }

    // The even columns, then the odd ones.
    static LLMKERN_INLINE_MEMBER void arrange(const int8_t* from, int8_t* to) {
        const __m512i even_odd =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const __m512i halves = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        I32 half[2];
        for (int i = 0; i < 2; ++i)
            half[i].v =
                _mm512_permutexvar_epi32(halves, _mm512_shuffle_epi8(_mm512_loadu_si512(from + 64 * i), even_odd));
        _mm512_storeu_si512(to, shuffle_parts<0x44>(half[0], half[1]).v);
        _mm512_storeu_si512(to + 64, shuffle_parts<0xee>(half[0], half[1]).v);
    }
};

// 64 columns; the codes are made unsigned.
struct Dot8 {
    static constexpr bool FAST = true;
    static constexpr int BYTES = 64, COLUMNS = 64, OFFSET = 128;
    static constexpr int64_t STREAM_ROWS = 16;

    struct Weights {
        __m512i codes;
    };
    static LLMKERN_INLINE_MEMBER Weights load(const uint8_t* p) {
        return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
    }
    static LLMKERN_INLINE_MEMBER I32 add(I32 sum, Weights w, const int8_t* x) {
        sum.v = add_products(sum.v, w.codes, _mm512_loadu_si512(x));
        return sum;
    }
    static LLMKERN_INLINE_MEMBER I32 sums(const int8_t* x) { return code_sums(x); }
    static LLMKERN_INLINE_MEMBER void arrange(const int8_t* from, int8_t* to) {
        _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    }
};

// ---- more rows of x ----

// See integer_tile.inl. 6 rows of x by 4 registers of w take 24 sums, 4 registers and one for x: 29 of 32, for
// 10 loads per 24 products.
struct TileBase {
    static constexpr bool FAST = true;
    static constexpr int VECTORS = 4, X_ROWS = 6, BYTES = 64, STEP = 4;
    static constexpr int STEP_BYTES = VECTORS * 64;

    static LLMKERN_INLINE_MEMBER void pack(const int8_t* codes, int64_t ld, int rows, int64_t steps, uint32_t* to) {
        const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
        for (int64_t s = 0; s < steps; s += 16) {
            __m512i from[16], columns[16];
            for (int r = 0; r < 16; ++r)
                from[r] = r < rows ? _mm512_loadu_si512(codes + r * ld + 4 * s) : _mm512_setzero_si512();
            transpose_dwords(from, columns);
            for (int i = 0; i < 16 && s + i < steps; ++i)
                _mm512_mask_storeu_epi32(to + (s + i) * rows, mask, columns[i]);
        }
    }

    template <int ROWS>
    static LLMKERN_INLINE_MEMBER void multiply(I32 (&sums)[ROWS][VECTORS], const uint8_t* tile, const uint32_t* x,
                                               int64_t steps) {
        for (int64_t s = 0; s < steps; ++s) {
            __m512i w[VECTORS];
            for (int v = 0; v < VECTORS; ++v) w[v] = _mm512_load_si512(tile + s * STEP_BYTES + v * 64);
            for (int r = 0; r < ROWS; ++r) {
                const __m512i codes = _mm512_set1_epi32(static_cast<int>(x[s * ROWS + r]));
                for (int v = 0; v < VECTORS; ++v) sums[r][v].v = add_products(sums[r][v].v, w[v], codes);
            }
        }
    }

    // The first `bytes` bytes at each of the rows, zeros behind them, turned.
    static LLMKERN_INLINE_MEMBER void load_turned(const uint8_t* const (&rows)[16], int bytes, __m512i (&to)[16]) {
        __m512i from[16];
        if (bytes == BYTES) {
            for (int i = 0; i < 16; ++i) from[i] = _mm512_loadu_si512(rows[i]);
        } else {
            const __mmask64 some = (__mmask64{1} << bytes) - 1;
            for (int i = 0; i < 16; ++i) from[i] = _mm512_maskz_loadu_epi8(some, rows[i]);
        }
        transpose_dwords(from, to);
    }
};

// A dword of a row is 8 columns: the even ones in its low nibbles, then the odd ones.
struct Tile4 : TileBase {
    static constexpr int COLUMNS = 128, UNIT = 8, OFFSET = 8;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t* codes, int64_t count) {
        const __m512i order =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
        for (int64_t k = 0; k < count; k += 64)
            _mm512_storeu_si512(codes + k, _mm512_shuffle_epi8(_mm512_loadu_si512(codes + k), order));
    }
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[16], int bytes, uint8_t* to) {
        const __m512i mask = _mm512_set1_epi8(15);
        __m512i dwords[16];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 16; ++i) {
            _mm512_store_si512(to + 2 * i * STEP_BYTES, _mm512_and_si512(dwords[i], mask));
            _mm512_store_si512(to + (2 * i + 1) * STEP_BYTES, _mm512_and_si512(_mm512_srli_epi16(dwords[i], 4), mask));
        }
    }
};

struct Tile8 : TileBase {
    static constexpr int COLUMNS = 64, UNIT = 4, OFFSET = 128;

    static LLMKERN_INLINE_MEMBER void arrange(int8_t*, int64_t) {}
    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[16], int bytes, uint8_t* to) {
        __m512i dwords[16];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 16; ++i)
            _mm512_store_si512(to + i * STEP_BYTES, _mm512_xor_si512(dwords[i], _mm512_set1_epi8(-128)));
    }
};

}  // namespace llmkern::LLMKERN_NS
