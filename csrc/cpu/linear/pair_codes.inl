// Integer codes as bf16 pairs. Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// For the weights of the next rows, a tile later: to L2, which holds both.
LLMKERN_INLINE void prefetch_later(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// How far ahead of its reading a stream of weights is asked for, in bytes.
constexpr int64_t PAIR_AHEAD = 2048;

// bf16 of u - 8, twice: vpermw, for which it is, reads the low 5 bits of a word and no others.
LLMKERN_INLINE __m512i nibble_values() {
    alignas(64) static constexpr uint16_t VALUES[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    return _mm512_load_si512(VALUES);
}

// For vpmultishiftqb: bits `first`.. of each dword to its low word, `second`.. to its high word.
LLMKERN_INLINE __m512i nibble_shifts(int first, int second) {
    const int64_t low = first | second << 16;
    return _mm512_set1_epi64(low | (low | 0x200020) << 32);
}

// Of four int8 codes per dword the first two (part 0) or the others, as a pair of bf16.
LLMKERN_INLINE __m512i byte_pairs(__m512i dwords, int part) {
    // Byte u as the low bits of the float 2^23 makes 2^23 + u; u = code + 128. Any code is exact in 8 bits.
    const __m512i magic = _mm512_set1_epi32(0x4b000000), flip = _mm512_set1_epi8(-128);
    const __m512 offset = _mm512_set1_ps(8388608 + 128);
    const __m512i high_to_low = _mm512_set1_epi32(0x00000302),
                  in_part = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i u = _mm512_xor_si512(dwords, flip);
    __m512i code[2];
    for (int i = 0; i < 2; ++i) {
        const __m512i byte = _mm512_mask_shuffle_epi8(magic, 0x1111111111111111, u,
                                                      _mm512_or_si512(in_part, _mm512_set1_epi32(2 * part + i)));
        code[i] = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(byte), offset));
    }
    return _mm512_mask_shuffle_epi8(code[1], 0x3333333333333333, code[0], _mm512_or_si512(in_part, high_to_low));
}
constexpr int byte_pairs_column(int part, int word) { return word / 2 * 4 + 2 * part + word % 2; }

LLMKERN_INLINE void unpack_bytes(__m512i dwords, __m512i (&pairs)[2]) {
    for (int i = 0; i < 2; ++i) pairs[i] = byte_pairs(dwords, i);
}
