// Rows of int8 codes as bf16 pairs. Included inside namespace llmkern::LLMKERN_NS.

struct Int8Pairs {
    static constexpr int COLUMNS = 64, PARTS = 2;
    static constexpr bool ZERO_POINTS = true;
    static constexpr int64_t STREAM_ROWS = 8;
    static constexpr int place(int dword, int part) { return 2 * dword + part; }

    struct Cursor {
        const int8_t* codes;
    };

    const int8_t* codes;
    int64_t k;

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row) const { at.codes = codes + row * k; }

    LLMKERN_INLINE_MEMBER void chunk(Cursor&, int64_t) const {}

    LLMKERN_INLINE_MEMBER __m512i step(Cursor& at) const {
        const __m512i bytes = _mm512_loadu_si512(at.codes);
        prefetch_later(at.codes + TILE_LANES * k);
        at.codes += COLUMNS;
        return bytes;
    }

    LLMKERN_INLINE_MEMBER __m512i stream(Cursor& at) const {
        const __m512i bytes = _mm512_loadu_si512(at.codes);
        prefetch(at.codes + PAIR_AHEAD);
        at.codes += COLUMNS;
        return bytes;
    }

    LLMKERN_INLINE_MEMBER __m512i pairs(__m512i dwords, int part) const { return byte_pairs(dwords, part); }
    static constexpr int column(int part, int word) { return byte_pairs_column(part, word); }

    LLMKERN_INLINE_MEMBER __m512i last(Cursor& at, int columns) const {
        return _mm512_maskz_loadu_epi8(bytes_mask(columns), at.codes);
    }

    LLMKERN_INLINE_MEMBER void unpack(__m512i dwords, __m512i (&pairs)[PARTS]) const { unpack_bytes(dwords, pairs); }
};
