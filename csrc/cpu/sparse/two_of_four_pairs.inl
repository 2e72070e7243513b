// The rows of a 2:4 weight as bf16 pairs. Included inside namespace llmkern::LLMKERN_NS.

template <Kept KEPT>
struct TwoOfFourPairs : SparsePairs<KEPT> {
    using SparsePairs<KEPT>::COLUMNS;

    struct Cursor {
        const uint8_t* values;
        const uint8_t* positions;
        const uint8_t* end;  // of the row's positions
        const uint8_t* bits;
        alignas(64) uint8_t chunk_bits[CHUNK_COLUMNS / 8];  // of the chunk's columns
    };

    const uint8_t* values;
    int64_t row_bytes;         // of values
    const uint8_t* positions;  // [n, ceil(k / 8)]
    int64_t k;

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row) const {
        at.values = values + row * row_bytes;
        at.positions = positions + row * ((k + 7) / 8);
        at.end = at.positions + (k + 7) / 8;
    }

    // Nibble p0 | p1 << 2 -> 1 << p0 | 1 << p1, for 512 columns at once.
    LLMKERN_INLINE_MEMBER void chunk(Cursor& at, int64_t) const {
        static_assert(CHUNK_COLUMNS / 8 == 64, "a chunk's positions fill one vector");
        const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
        const __m512i high = _mm512_slli_epi16(low, 4), nibble = _mm512_set1_epi8(15);
        const __m512i bytes = _mm512_maskz_loadu_epi8(bytes_mask(at.end - at.positions), at.positions);
        const __m512i first = _mm512_shuffle_epi8(low, _mm512_and_si512(bytes, nibble));
        const __m512i second = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble));
        _mm512_store_si512(at.chunk_bits, _mm512_or_si512(first, second));
        prefetch_later(at.positions + TILE_LANES * ((k + 7) / 8));
        at.positions += CHUNK_COLUMNS / 8;
        at.bits = at.chunk_bits;
    }

    LLMKERN_INLINE_MEMBER __m512i step(Cursor& at) const {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.values));
        prefetch_later(at.values + TILE_LANES * row_bytes);
        return place_values(at, low);
    }

    LLMKERN_INLINE_MEMBER __m512i last(Cursor& at, int columns) const {
        const int64_t bytes = kept_bytes(KEPT, (columns + 3) / 4 * 2);
        return place_values(at, _mm256_maskz_loadu_epi8(static_cast<__mmask32>(bytes_mask(bytes)), at.values));
    }

    // Every format has 32 bytes of kept values per step.
    LLMKERN_INLINE_MEMBER __m512i place_values(Cursor& at, __m256i kept) const {
        static_assert(kept_bytes(KEPT, COLUMNS / 2) == 32, "a step's values are half a vector");
        uint64_t bits[2] = {};
        __builtin_memcpy(bits, at.bits, COLUMNS / 8);
        at.bits += COLUMNS / 8;
        at.values += 32;
        if constexpr (KEPT == Kept::BF16)
            return expand_words(static_cast<uint32_t>(bits[0]), _mm512_castsi256_si512(kept));
        else if constexpr (KEPT == Kept::I8)
            return expand_bytes(bits[0], _mm512_castsi256_si512(kept));
        else
            return expand_nibbles(bits[0], bits[1], kept);
    }
};
