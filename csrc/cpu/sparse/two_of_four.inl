// The rows of a 2:4 weight, for the linear driver. Included inside namespace llmkern::LLMKERN_NS.

template <Kept KEPT, Order ORDER>
struct TwoOfFourSource {
    static constexpr Count COUNT = Count::TWO_OF_FOUR;
    static constexpr int VECTORS = EXPAND_VECTORS;
    static constexpr int column(int p) { return expanded_column<KEPT, ORDER>(p); }
    static constexpr int64_t VALUE_BYTES = kept_bytes(KEPT, EXPAND_CHUNK / 2);
    static constexpr int64_t POSITION_BYTES = EXPAND_CHUNK / 8;

    struct Cursor {
        const uint8_t* values;
        const uint8_t* positions;
        ScaleCursor<ORDER> scales;
    };

    const uint8_t* values;
    int64_t row_bytes;         // of values
    const uint8_t* positions;  // [n, ceil(k / 8)]
    int64_t k;
    KeptScales scales;

    int64_t group_chunks() const { return scale_group_chunks<ORDER>(scales); }
    int64_t buffer_floats() const { return scale_buffer_floats<ORDER>(scales); }

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row, float* buffer) const {
        at.values = values + row * row_bytes;
        at.positions = positions + row * ((k + 7) / 8);
        start_scales(scales, at.scales, row, buffer);
    }

    LLMKERN_INLINE_MEMBER void group(Cursor& at) const { next_group(scales, at.scales); }

    LLMKERN_INLINE_MEMBER void next(Cursor& at, F32 (&w)[VECTORS]) const {
        for (int64_t i = 0; i < VALUE_BYTES; i += 64) prefetch(at.values + PREFETCH_AHEAD + i);
        prefetch(at.positions + PREFETCH_AHEAD / (VALUE_BYTES / POSITION_BYTES));
        decode(at, at.values, at.positions, w);
        at.values += VALUE_BYTES;
        at.positions += POSITION_BYTES;
    }

    LLMKERN_INLINE_MEMBER void last(Cursor& at, F32 (&w)[VECTORS], int columns) const {
        const Tail tail(at, columns);
        decode(at, tail.values, tail.positions, w);
    }

    // The short chunk that ends a row. Quads past the row have zeros for positions and values: whatever they give meets
    // zeros of x.
    struct Tail {
        uint8_t values[VALUE_BYTES] = {}, positions[POSITION_BYTES] = {};

        LLMKERN_INLINE_MEMBER Tail(const Cursor& at, int columns) {
            const int quads = (columns + 3) / 4;
            for (int i = 0; i < kept_bytes(KEPT, 2 * quads); ++i) values[i] = at.values[i];
            for (int i = 0; i < (quads + 1) / 2; ++i) positions[i] = at.positions[i];
        }
    };

    LLMKERN_INLINE_MEMBER void decode(Cursor& at, const uint8_t* kept, const uint8_t* places, F32 (&w)[VECTORS]) const {
        expand<KEPT, ORDER, Count::TWO_OF_FOUR>(w, bits_of_positions(places), kept, at.scales.scale);
        if constexpr (ORDER == Order::NATURAL) scale_columns(at.scales, w);
    }

#ifdef LLMKERN_COMPACT
    static constexpr int MOST_KEPT = EXPAND_CHUNK / 2;

    // See skip.inl: prefetches what the next `columns` columns read.
    LLMKERN_INLINE_MEMBER void ask(const Cursor& at, int columns) const {
        for (int64_t i = 0; i < kept_bytes(KEPT, columns / 2); i += 64) prefetch(at.values + i);
        prefetch(at.positions);
    }

    LLMKERN_INLINE_MEMBER int keep(Cursor& at, float* w, uint16_t* places, int first, int stride) const {
        const int count = keep_from(at, at.values, at.positions, w, places, first, stride);
        at.values += VALUE_BYTES;
        at.positions += POSITION_BYTES;
        return count;
    }

    LLMKERN_INLINE_MEMBER int keep_last(Cursor& at, float* w, uint16_t* places, int first, int stride,
                                        int columns) const {
        const Tail tail(at, columns);
        return keep_from(at, tail.values, tail.positions, w, places, first, stride);
    }

    LLMKERN_INLINE_MEMBER int keep_from(Cursor& at, const uint8_t* kept, const uint8_t* positions_, float* w,
                                        uint16_t* places, int first, int stride) const {
        const int count = compact<KEPT, Count::TWO_OF_FOUR>(w, places, bits_of_positions(positions_), kept,
                                                            at.scales.scale, first, stride);
        if constexpr (ORDER == Order::NATURAL) {  // groups are whole quads
            for (int i = 0; i < count; ++i) w[i] *= at.scales.next[i / 2 * 4];
            at.scales.next += EXPAND_CHUNK;
        }
        return count;
    }
#endif
};
