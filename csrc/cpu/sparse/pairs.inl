// Kept values and where they stand as bf16 pairs: what the sparse formats share. Values are bf16 or codes; those of
// more precision keep the fp32 way, which loses nothing. Included inside namespace llmkern::LLMKERN_NS.

template <Kept KEPT>
struct SparsePairs {
    static_assert(KEPT == Kept::BF16 || KEPT == Kept::I8 || KEPT == Kept::I4, "exact in bf16");
    static constexpr int PARTS = KEPT == Kept::BF16 ? 1 : KEPT == Kept::I8 ? 2 : 4;
    static constexpr int COLUMNS = 32 * PARTS;
    // I4: low nibbles are the first 64 columns of the step, high nibbles the others.
    static constexpr int place(int dword, int part) {
        return KEPT == Kept::I4 ? part / 2 * 32 + 2 * dword + part % 2 : PARTS * dword + part;
    }

    LLMKERN_INLINE_MEMBER void unpack(__m512i dwords, __m512i (&pairs)[PARTS]) const {
        if constexpr (KEPT == Kept::BF16) {
            pairs[0] = dwords;
        } else if constexpr (KEPT == Kept::I8) {
            unpack_bytes(dwords, pairs);
        } else {
            for (int part = 0; part < 4; ++part) {
                const int first = part % 2 * 16 + part / 2 * 4;
                const __m512i index = _mm512_multishift_epi64_epi8(nibble_shifts(first, first + 8), dwords);
                pairs[part] = _mm512_permutexvar_epi16(index, nibble_values());
            }
        }
    }
};

// The kept values that stand at the set bits of 32 (bf16) or 64 (codes) columns, in place.
LLMKERN_INLINE __m512i expand_words(uint32_t bits, __m512i values) {
    return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), values);
}
LLMKERN_INLINE __m512i expand_bytes(uint64_t bits, __m512i values) { return _mm512_maskz_expand_epi8(bits, values); }

// 32 bytes of kept nibbles, at the set bits of 128 columns: columns 0..63 in the low nibbles, 64..127 in the high ones.
LLMKERN_INLINE __m512i expand_nibbles(uint64_t low_bits, uint64_t high_bits, __m256i kept) {
    const auto widen = [](__m128i bytes) __attribute__((always_inline)) {  // hl -> .l .h
        const __m256i wide = _mm256_cvtepu8_epi16(bytes);
        return _mm512_castsi256_si512(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)));
    };
    const __m512i none = _mm512_set1_epi8(8);
    const __m512i low = _mm512_mask_expand_epi8(none, low_bits, widen(_mm256_castsi256_si128(kept)));
    const __m512i high = _mm512_mask_expand_epi8(none, high_bits, widen(_mm256_extracti128_si256(kept, 1)));
    // low & 15 | high << 4 & ~15
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, _mm512_slli_epi16(high, 4), 0xca);
}
