// The kept values of a 2:4 row as bf16 numbers in order, 64 columns at a time, for products with the x of their columns
// alone. Included inside namespace llmkern::LLMKERN_NS.

constexpr int STEP_COLUMNS = 64;
constexpr int STEP_QUADS = STEP_COLUMNS / 4;
constexpr int STEP_POSITIONS = STEP_QUADS / 2;  // bytes
template <Kept KEPT>
constexpr int STEP_VALUES = kept_bytes(KEPT, STEP_COLUMNS / 2);  // bytes

LLMKERN_INLINE uint64_t load_word(const void* from) {
    uint64_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return word;
}

template <Kept KEPT>
LLMKERN_INLINE __m512i kept_words(const uint8_t* from) {
    if constexpr (KEPT == Kept::BF16) {
        return _mm512_loadu_si512(from);
    } else if constexpr (KEPT == Kept::I8) {
        const F32 low = load_i8(reinterpret_cast<const int8_t*>(from));
        const F32 high = load_i8(reinterpret_cast<const int8_t*>(from) + LANES);
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
    } else {  // word i of a qword takes its nibble i; the look-up ignores what is above it
        const __m512i fours = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x000c000800040000), fours);
        return _mm512_permutexvar_epi16(index, nibble_values());
    }
}

// The short step that ends a row. What is past the row has zeros for positions and bytes of values: any number, which
// meets zeros of x.
template <Kept KEPT>
struct LastStep {
    alignas(64) uint8_t values[STEP_VALUES<KEPT>] = {};
    uint8_t positions[STEP_POSITIONS] = {};

    LLMKERN_INLINE_MEMBER void take(const uint8_t* from, const uint8_t* positions_from, int columns) {
        const int quads = (columns + 3) / 4;
        for (int i = 0; i < kept_bytes(KEPT, 2 * quads); ++i) values[i] = from[i];
        for (int i = 0; i < (quads + 1) / 2; ++i) positions[i] = positions_from[i];
    }
};
