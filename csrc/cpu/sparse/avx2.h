// Kept values in AVX2: eight columns at once, put in place by vpermps with a row of a table. See sparse.h for the
// interface.
#pragma once

#include "cpu/simd/avx2.h"
#include "cpu/sparse/sparse.h"

namespace llmkern::avx2 {

constexpr int EXPAND_VECTORS = 4;
constexpr int EXPAND_CHUNK = EXPAND_VECTORS * F32::WIDTH;

template <Kept, Order>
constexpr int expanded_column(int p) {
    return p;
}

// Row b: for each of eight columns, which of the kept values it takes if bit b of the column is set, else -1. As a
// lane number -1 is 7, which holds 0 when there are four values.
struct PlaceTable {
    int8_t place[256][8];

    constexpr PlaceTable() : place() {
        for (int bits = 0; bits < 256; ++bits)
            for (int column = 0, next = 0; column < 8; ++column)
                place[bits][column] = static_cast<int8_t>(bits >> column & 1 ? next++ : -1);
    }
};
alignas(64) constexpr PlaceTable PLACES;

LLMKERN_INLINE uint64_t bits_of_positions(const uint8_t* positions) {
    // Nibble p0 | p1 << 2 -> 1 << p0 | 1 << p1, for two nibbles (eight columns) per byte.
    const __m128i low = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
    const __m128i high = _mm_slli_epi16(low, 4);  // no entry exceeds 15
    int32_t word;
    __builtin_memcpy(&word, positions, sizeof word);
    const __m128i bytes = _mm_cvtsi32_si128(word), nibble = _mm_set1_epi8(15);
    const __m128i first = _mm_shuffle_epi8(low, _mm_and_si128(bytes, nibble));
    const __m128i second = _mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_or_si128(first, second)));
}

// Eight values as F32, or four and zeros.
template <Kept KEPT, Count COUNT>
LLMKERN_INLINE F32 load_kept(const uint8_t* from) {
    if constexpr (COUNT == Count::ANY) {
        if constexpr (KEPT == Kept::F32) return load(reinterpret_cast<const float*>(from));
        if constexpr (KEPT == Kept::BF16) return load_bf16(reinterpret_cast<const uint16_t*>(from));
        if constexpr (KEPT == Kept::F16) return load_f16(reinterpret_cast<const uint16_t*>(from));
        if constexpr (KEPT == Kept::I8) return load_i8(reinterpret_cast<const int8_t*>(from));
    } else {
        __m128 four;
        if constexpr (KEPT == Kept::F32) {
            four = _mm_loadu_ps(reinterpret_cast<const float*>(from));
        } else if constexpr (KEPT == Kept::I8) {
            int32_t word;
            __builtin_memcpy(&word, from, sizeof word);
            four = _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(word)));
        } else {
            const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
            four = KEPT == Kept::F16 ? _mm_cvtph_ps(halves)
                                     : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
        }
        return {_mm256_zextps128_ps256(four)};
    }
}

template <Kept KEPT, Order ORDER, Count COUNT>
LLMKERN_INLINE void expand(F32 (&w)[EXPAND_VECTORS], uint64_t bits, const uint8_t* from, F32 scale) {
    if constexpr (KEPT == Kept::I4) {
        static_assert(COUNT == Count::TWO_OF_FOUR, "int4 values are 2:4");
        // A byte hl becomes the bytes l - 8 and h - 8.
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), nibble = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(bytes, nibble), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        alignas(16) uint8_t codes[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(codes),
                        _mm_sub_epi8(_mm_unpacklo_epi8(low, high), _mm_set1_epi8(8)));
        expand<Kept::I8, ORDER, COUNT>(w, bits, codes, scale);
        return;
    } else {
        for (int v = 0; v < EXPAND_VECTORS; ++v) {
            const auto eight = static_cast<uint8_t>(bits >> 8 * v);
            const __m256i place =
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.place[eight])));
            w[v].v = _mm256_permutevar8x32_ps(load_kept<KEPT, COUNT>(from).v, place);
            if (COUNT == Count::ANY)
                w[v].v = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), w[v].v);
            if (KEPT == Kept::I8) w[v] = w[v] * scale;
            from += kept_bytes(KEPT, COUNT == Count::TWO_OF_FOUR ? 4 : __builtin_popcount(eight));
        }
    }
}

}  // namespace llmkern::avx2
