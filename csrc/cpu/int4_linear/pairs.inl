// Rows of nibbles as bf16 pairs. Included inside namespace llmkern::LLMKERN_NS.

struct Int4Pairs {
    static constexpr int COLUMNS = 128, PARTS = 4;
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

    LLMKERN_INLINE_MEMBER __m512i last(Cursor& at, int) const {
        return _mm512_maskz_loadu_epi8(bytes_mask(at.end - at.bytes), at.bytes);
    }

    LLMKERN_INLINE_MEMBER void unpack(__m512i dwords, __m512i (&pairs)[PARTS]) const {
        // vpmultishiftqb takes any 8 bits of a quadword to a byte, vpermw reads the low 5 bits of a word and no others:
        // each value stands in its table twice.
        const __m512i table = nibble_values();
        for (int part = 0; part < PARTS; ++part) {
            const __m512i shifts = nibble_shifts(8 * part, 8 * part + 4);
            pairs[part] = _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, dwords), table);
        }
    }
};
