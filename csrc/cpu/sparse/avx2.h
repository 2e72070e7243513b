// Kept values in AVX2: eight columns at once, put in place and widened by one byte shuffle with a row of a table. See
// sparse.h for the interface.
#pragma once

#include "cpu/simd/avx2.h"
#include "cpu/sparse/sparse.h"

#define LLMKERN_COMPACT

namespace llmkern::avx2 {

constexpr int EXPAND_VECTORS = 4;
constexpr int EXPAND_CHUNK = EXPAND_VECTORS * F32::WIDTH;

template <Kept, Order>
constexpr int expanded_column(int p) {
    return p;
}

// Positions stay as they are: tables are read by them as well as by bits.
LLMKERN_INLINE uint64_t bits_of_positions(const uint8_t* positions) {
    uint32_t word;
    __builtin_memcpy(&word, positions, sizeof word);
    return word;
}

// How eight columns take their values, by their byte of bits or of positions: a control of vpshufb, or with fp32 lane
// numbers of vpermps; the sign is set where a column has no value.
//   bf16: to the upper half of a 32-bit lane    int8: to its upper byte    fp16: side by side, half a vector
template <Kept KEPT, Count COUNT>
struct PlaceTable {
    static constexpr int LANE = KEPT == Kept::F16 ? 2 : 4, BYTES = kept_bytes(KEPT, 1);
    alignas(32) int8_t row[256][8 * LANE];

    constexpr PlaceTable() : row() {
        for (int byte = 0; byte < 256; ++byte) {
            int value[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
            if (COUNT == Count::TWO_OF_FOUR)
                for (int i = 0; i < 4; ++i) value[i / 2 * 4 + (byte >> 2 * i & 3)] = i;
            else
                for (int column = 0, next = 0; column < 8; ++column)
                    if (byte >> column & 1) value[column] = next++;
            for (int column = 0; column < 8; ++column)
                for (int i = 0; i < LANE; ++i) {
                    const int at = KEPT == Kept::F32 ? 0 : i - LANE + BYTES;  // byte of the value
                    row[byte][column * LANE + i] =
                        static_cast<int8_t>(value[column] < 0   ? -1
                                            : KEPT == Kept::F32 ? (i == 0 ? value[column] : 0)
                                            : at < 0            ? -1
                                                                : value[column] * BYTES + at);
                }
        }
    }
};
template <Kept KEPT, Count COUNT>
inline constexpr PlaceTable<KEPT, COUNT> PLACES;

LLMKERN_INLINE __m256i twice(const void* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

LLMKERN_INLINE __m256i eight_bytes(const void* from) {
    int64_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return _mm256_set1_epi64x(word);
}

// Nibbles as the bytes u - 8, in order, the same in both halves.
LLMKERN_INLINE __m256i nibble_codes(const uint8_t* from) {
    const __m256i bytes = eight_bytes(from), nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(bytes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    return _mm256_sub_epi8(_mm256_unpacklo_epi8(low, high), _mm256_set1_epi8(8));
}

// A code in the upper byte of a lane is 2^24 times itself: exact, and the scale takes it back.
constexpr float UPPER_BYTE = 0x1p-24f;

template <Kept KEPT, Order ORDER, Count COUNT>
LLMKERN_INLINE void expand(F32 (&w)[EXPAND_VECTORS], uint64_t bits, const uint8_t* from, F32 scale) {
    static_assert(KEPT != Kept::I4 || COUNT == Count::TWO_OF_FOUR, "int4 values are 2:4");
    constexpr Kept STORED = KEPT == Kept::I4 ? Kept::I8 : KEPT;  // as the table takes it
    constexpr bool CODES = STORED == Kept::I8;
    const F32 upper = CODES ? scale * set1(UPPER_BYTE) : scale;
    __m256i values = _mm256_setzero_si256();  // 2:4: 16 bytes of them, used by the next vectors of columns as well
    for (int v = 0; v < EXPAND_VECTORS; ++v) {
        const auto eight = static_cast<uint8_t>(bits >> 8 * v);
        const int8_t* row = PLACES<STORED, COUNT>.row[eight];
        __m256i place = KEPT == Kept::F16
                            ? _mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row)))
                            : _mm256_load_si256(reinterpret_cast<const __m256i*>(row));
        if constexpr (KEPT == Kept::F32) {
            if (COUNT == Count::ANY) {
                w[v].v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(from)), place);
                w[v].v = _mm256_blendv_ps(w[v].v, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
            } else {  // a lane without a value takes lane 7, which is 0
                const __m128 four = _mm_loadu_ps(reinterpret_cast<const float*>(from));
                w[v].v = _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(four), place);
            }
        } else {
            if constexpr (COUNT == Count::ANY) {
                values = KEPT == Kept::I8 ? eight_bytes(from) : twice(from);
            } else {
                constexpr int BYTES = kept_bytes(STORED, 4);  // of eight columns
                const int at = v * BYTES % 16;
                if (at == 0) values = KEPT == Kept::I4 ? nibble_codes(from) : twice(from);
                if (at != 0) place = _mm256_or_si256(place, _mm256_set1_epi8(static_cast<int8_t>(at)));
            }
            if constexpr (KEPT == Kept::F16) {
                w[v].v =
                    _mm256_cvtph_ps(_mm_shuffle_epi8(_mm256_castsi256_si128(values), _mm256_castsi256_si128(place)));
            } else {
                const __m256i placed = _mm256_shuffle_epi8(values, place);
                w[v].v = CODES ? _mm256_cvtepi32_ps(placed) : _mm256_castsi256_ps(placed);
                if (CODES) w[v] = w[v] * upper;
            }
        }
        if (COUNT == Count::ANY)
            from += kept_bytes(KEPT, __builtin_popcount(eight));
        else if (KEPT == Kept::F32 || (KEPT != Kept::I4 && (v + 1) * kept_bytes(KEPT, 4) % 16 == 0))
            from += 16;
    }
}

// The columns of the set bits of a byte, side by side.
struct ColumnTable {
    uint16_t row[256][8];

    constexpr ColumnTable() : row() {
        for (int bits = 0; bits < 256; ++bits)
            for (int column = 0, next = 0; column < 8; ++column)
                if (bits >> column & 1) row[bits][next++] = static_cast<uint16_t>(column);
    }
};
alignas(16) inline constexpr ColumnTable COLUMNS;

// See sparse.h.
template <Kept KEPT, Count COUNT>
LLMKERN_INLINE int compact(float* values, uint16_t* places, uint64_t bits, const uint8_t* from, F32 scale, int first,
                           int stride) {
    constexpr int MOST = COUNT == Count::TWO_OF_FOUR ? EXPAND_CHUNK / 2 : EXPAND_CHUNK;
    for (int i = 0; i < MOST; i += F32::WIDTH) {
        F32 value;
        if constexpr (KEPT == Kept::F32) value = load(reinterpret_cast<const float*>(from) + i);
        if constexpr (KEPT == Kept::BF16) value = load_bf16(reinterpret_cast<const uint16_t*>(from) + i);
        if constexpr (KEPT == Kept::F16) value = load_f16(reinterpret_cast<const uint16_t*>(from) + i);
        if constexpr (KEPT == Kept::I8) value = load_i8(reinterpret_cast<const int8_t*>(from) + i) * scale;
        if constexpr (KEPT == Kept::I4) {
            int32_t word;
            __builtin_memcpy(&word, from + i / 2, sizeof word);
            const __m256i nibbles =
                _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            const F32 u = {_mm256_cvtepi32_ps(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)))};
            value = (u - set1(8)) * scale;
        }
        store(values + i, value);
    }
    const auto to_place = static_cast<int16_t>(stride);
    if constexpr (COUNT == Count::TWO_OF_FOUR) {
        // Value i is in quad i / 2 at the two bits 2 i of the positions: shifted left to the top of a lane, then right.
        const __m256i halves = _mm256_setr_epi16(0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x100, 0x100,  //
                                                 0x302, 0x302, 0x302, 0x302, 0x302, 0x302, 0x302, 0x302);
        const __m256i word = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), halves);
        const __m256i to_top =
            _mm256_broadcastsi128_si256(_mm_setr_epi16(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1));
        const __m256i position = _mm256_srli_epi16(_mm256_mullo_epi16(word, to_top), 14);
        const __m256i quad = _mm256_setr_epi16(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
        const __m256i column =
            _mm256_add_epi16(_mm256_add_epi16(position, quad), _mm256_set1_epi16(static_cast<int16_t>(first)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(places),
                            _mm256_mullo_epi16(column, _mm256_set1_epi16(to_place)));
        return EXPAND_CHUNK / 2;
    } else {
        int count = 0;
        for (int v = 0; v < EXPAND_VECTORS; ++v) {
            const auto eight = static_cast<uint8_t>(bits >> 8 * v);
            const __m128i column = _mm_add_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(COLUMNS.row[eight])),
                                                 _mm_set1_epi16(static_cast<int16_t>(first + 8 * v)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(places + count),
                             _mm_mullo_epi16(column, _mm_set1_epi16(to_place)));
            count += __builtin_popcount(eight);
        }
        return count;
    }
}

}  // namespace llmkern::avx2
