// Rows of nibbles as bf16 pairs. Included inside namespace llmkern::LLMKERN_NS.

struct Int4Pairs {
    static constexpr int COLUMNS = 128, PARTS = 4;
    static constexpr bool ZERO_POINTS = true;
    static constexpr int64_t STREAM_ROWS = 16;
    static constexpr int place(int dword, int part) { return 4 * dword + part; }

    struct Cursor {
        const uint8_t* bytes;
        const uint8_t* end;
    };

    const uint8_t* nibbles;
    int64_t row_bytes;

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row) const {
        at.bytes = nibbles + row * row_bytes;
        at.end = at.bytes + row_bytes;
    }

    LLMKERN_INLINE_MEMBER void chunk(Cursor&, int64_t) const {}

    LLMKERN_INLINE_MEMBER __m512i step(Cursor& at) const {
        const __m512i bytes = _mm512_loadu_si512(at.bytes);
        prefetch_later(at.bytes + TILE_LANES * row_bytes);
        at.bytes += COLUMNS / 2;
        return bytes;
    }

    LLMKERN_INLINE_MEMBER __m512i stream(Cursor& at) const {
        const __m512i bytes = _mm512_loadu_si512(at.bytes);
        prefetch(at.bytes + PAIR_AHEAD);
        at.bytes += COLUMNS / 2;
        return bytes;
    }

    // Nibbles `part` and `part` + 4 of the eight in a dword, each at the low end of its word.
    LLMKERN_INLINE_MEMBER __m512i pairs(__m512i dwords, int part) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi32(dwords, static_cast<unsigned>(4 * part)), nibble_values());
    }
    static constexpr int column(int part, int word) { return word / 2 * 8 + word % 2 * 4 + part; }

    LLMKERN_INLINE_MEMBER __m512i last(Cursor& at, int) const {
        return _mm512_maskz_loadu_epi8(bytes_mask(at.end - at.bytes), at.bytes);
    }

    LLMKERN_INLINE_MEMBER void unpack(__m512i dwords, __m512i (&pairs)[PARTS]) const {
        // vpmultishiftqb takes any 8 bits of a quadword to a byte.
        const __m512i table = nibble_values();
        for (int part = 0; part < PARTS; ++part) {
            const __m512i shifts = nibble_shifts(8 * part, 8 * part + 4);
            pairs[part] = _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, dwords), table);
        }
    }
};
