// Kept values in AVX-512: 64 columns at once, put in place by vpexpand from registers (its memory form is microcode on
// some machines). See sparse.h for the interface.
#pragma once

#include "cpu/simd/avx512_vnni.h"
#include "cpu/simd/products.h"
#include "cpu/sparse/sparse.h"

namespace llmkern::LLMKERN_NS {

constexpr int EXPAND_VECTORS = 4;
constexpr int EXPAND_CHUNK = EXPAND_VECTORS * F32::WIDTH;

// bf16: of 32 columns the even ones, then the odd ones: a shift and an `and` make both from 32-bit lanes.
// Integers: lane i of vector v holds column 4 i + v: byte v of 32-bit lane i.
template <Kept KEPT, Order ORDER>
constexpr int expanded_column(int p) {
    if (KEPT == Kept::BF16) return p / 32 * 32 + (p % 16) * 2 + p % 32 / 16;
    if (ORDER == Order::FAST && (KEPT == Kept::I8 || KEPT == Kept::I4)) return p % 16 * 4 + p / 16;
    return p;
}

LLMKERN_INLINE uint64_t bits_of_positions(const uint8_t* positions) {
    // Nibble p0 | p1 << 2 -> 1 << p0 | 1 << p1, for two nibbles (eight columns) per byte.
    const __m128i low = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
    const __m128i high = _mm_slli_epi16(low, 4);  // no entry exceeds 15
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(positions)), nibble = _mm_set1_epi8(15);
    const __m128i first = _mm_shuffle_epi8(low, _mm_and_si128(bytes, nibble));
    const __m128i second = _mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(first, second)));
}

// The next values that up to 64 bytes of columns can use; 2:4 uses just half of them.
template <Count COUNT>
LLMKERN_INLINE __m512i load_kept(const uint8_t* from) {
    if (COUNT == Count::ANY) return in_register(_mm512_loadu_si512(from));
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <Count COUNT>
LLMKERN_INLINE int64_t count_kept(uint64_t bits, int columns) {
    return COUNT == Count::TWO_OF_FOUR ? columns / 2 : __builtin_popcountll(bits);
}

template <Kept KEPT, Order ORDER, Count COUNT>
LLMKERN_INLINE void expand(F32 (&w)[EXPAND_VECTORS], uint64_t bits, const uint8_t* from, F32 scale) {
    if constexpr (KEPT == Kept::F32) {
        for (int v = 0; v < 4; ++v) {
            const auto part = static_cast<__mmask16>(bits >> 16 * v);
            w[v].v = _mm512_maskz_expand_ps(part, _mm512_castsi512_ps(load_kept<COUNT>(from)));
            from += 4 * count_kept<COUNT>(part, 16);
        }
    } else if constexpr (KEPT == Kept::BF16 || KEPT == Kept::F16) {
        for (int half = 0; half < 2; ++half) {
            const auto part = static_cast<__mmask32>(bits >> 32 * half);
            const __m512i e = _mm512_maskz_expand_epi16(part, load_kept<COUNT>(from));
            if constexpr (KEPT == Kept::BF16) {
                w[2 * half].v = _mm512_castsi512_ps(_mm512_slli_epi32(e, 16));
                w[2 * half + 1].v = _mm512_castsi512_ps(_mm512_and_si512(e, _mm512_set1_epi32(-65536)));
            } else {
                w[2 * half].v = _mm512_cvtph_ps(_mm512_castsi512_si256(e));
                w[2 * half + 1].v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(e, 1));
            }
            from += 2 * count_kept<COUNT>(part, 32);
        }
    } else if constexpr (KEPT == Kept::I8) {
        const __m512i e = _mm512_maskz_expand_epi8(bits, load_kept<COUNT>(from));
        const __m512i q[4] = {
            ORDER == Order::FAST ? _mm512_slli_epi32(e, 24) : _mm512_cvtepi8_epi32(_mm512_castsi512_si128(e)),
            ORDER == Order::FAST ? _mm512_slli_epi32(e, 16) : _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(e, 1)),
            ORDER == Order::FAST ? _mm512_slli_epi32(e, 8) : _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(e, 2)),
            ORDER == Order::FAST ? e : _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(e, 3))};
        for (int v = 0; v < 4; ++v) {
            const __m512i code = ORDER == Order::FAST ? _mm512_srai_epi32(q[v], 24) : q[v];
            w[v].v = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale.v);
        }
    } else {
        static_assert(COUNT == Count::TWO_OF_FOUR, "int4 values are 2:4");
        // A byte hl becomes the bytes .l and .h: vpermps reads the low four bits of a lane and no others, as an index
        // into the 16 scaled values. Columns without a value get the code of 0.
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m512i codes = _mm512_castsi256_si512(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)));
        const __m512i e = _mm512_mask_expand_epi8(_mm512_set1_epi8(8), bits, codes);
        const __m512i index[4] = {
            ORDER == Order::FAST ? e : _mm512_cvtepu8_epi32(_mm512_castsi512_si128(e)),
            ORDER == Order::FAST ? _mm512_srli_epi32(e, 8) : _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(e, 1)),
            ORDER == Order::FAST ? _mm512_srli_epi32(e, 16) : _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(e, 2)),
            ORDER == Order::FAST ? _mm512_srli_epi32(e, 24) : _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(e, 3))};
        const F32 values = (iota() - set1(8)) * scale;
        for (int v = 0; v < 4; ++v) w[v].v = _mm512_permutexvar_ps(index[v], values.v);
    }
}

}  // namespace llmkern::LLMKERN_NS
