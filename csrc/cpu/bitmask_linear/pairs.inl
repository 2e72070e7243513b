// The rows of an unstructured sparse weight as bf16 pairs. Included inside namespace llmkern::LLMKERN_NS.

template <Kept KEPT>
struct BitmaskPairs : SparsePairs<KEPT> {
    using SparsePairs<KEPT>::COLUMNS;
    static constexpr bool ZERO_POINTS = false;
    static constexpr int64_t STREAM_ROWS = 8;

    struct Cursor {
        const uint8_t* values;
        const uint8_t* bits;
    };

    const uint8_t* values;
    const uint8_t* values_end;
    const uint8_t* bits;
    const int64_t* row_offsets;
    int64_t k;

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row) const {
        at.values = values + kept_bytes(KEPT, row_offsets[row]);
        at.bits = bits + row * ((k + 7) / 8);
    }

    LLMKERN_INLINE_MEMBER void chunk(Cursor& at, int64_t) const {
        prefetch_later(at.bits + TILE_LANES * ((k + 7) / 8));
    }

    LLMKERN_INLINE_MEMBER __m512i step(Cursor& at) const {
        uint64_t word = 0;
        __builtin_memcpy(&word, at.bits, COLUMNS / 8);
        at.bits += COLUMNS / 8;
        // About where these columns' values of the row a tile later are.
        prefetch_later(at.values + kept_bytes(KEPT, TILE_LANES * k / 2));
        return place_values(at, word);
    }

    LLMKERN_INLINE_MEMBER __m512i stream(Cursor& at) const {
        uint64_t word = 0;
        __builtin_memcpy(&word, at.bits, COLUMNS / 8);
        prefetch(at.bits + PAIR_AHEAD);
        at.bits += COLUMNS / 8;
        prefetch(at.values + PAIR_AHEAD);
        return place_values(at, word);
    }

    LLMKERN_INLINE_MEMBER __m512i pairs(__m512i dwords, int part) const {
        return KEPT == Kept::BF16 ? dwords : byte_pairs(dwords, part);
    }
    static constexpr int column(int part, int word) {
        return KEPT == Kept::BF16 ? word : byte_pairs_column(part, word);
    }

    LLMKERN_INLINE_MEMBER __m512i last(Cursor& at, int columns) const {
        uint64_t word = 0;
        for (int i = 0; i < (columns + 7) / 8; ++i) word |= static_cast<uint64_t>(at.bits[i]) << 8 * i;
        return place_values(at, word & bytes_mask(columns));
    }

    LLMKERN_INLINE_MEMBER __m512i place_values(Cursor& at, uint64_t word) const {
        const int64_t bytes = kept_bytes(KEPT, __builtin_popcountll(word));
        const bool whole = __builtin_expect(values_end - at.values >= 64, true);
        const __m512i kept =
            whole ? _mm512_loadu_si512(at.values) : _mm512_maskz_loadu_epi8(bytes_mask(bytes), at.values);
        at.values += bytes;
        return KEPT == Kept::BF16 ? expand_words(static_cast<uint32_t>(word), kept) : expand_bytes(word, kept);
    }
};
