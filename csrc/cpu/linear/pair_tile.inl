// Weights that become pairs of bf16 exactly (codes without their scale, or bf16 values), in the layout in which pairs
// of x are multiplied with them.
//
// A weight format gives Pairs, which decode one row from left to right in steps of COLUMNS columns. 16 rows are decoded
// at once; their steps are transposed, still compressed, so that lane n of a vector belongs to row n:
//
//   struct Pairs {
//       static constexpr int COLUMNS;     // of a step; its codes fill 16 dwords
//       static constexpr int PARTS;       // COLUMNS / 32: vectors of pairs that one vector of dwords decodes to
//       static constexpr int place(int dword, int part);     // which pair of columns of the step they are
//       struct Cursor;                                       // where in a row we are
//       void start(Cursor&, int64_t row) const;
//       void chunk(Cursor&, int64_t columns) const;          // called before the steps of every CHUNK_COLUMNS
//       __m512i step(Cursor&) const;                         // the next step's dwords
//       __m512i last(Cursor&, int columns) const;            // likewise of the short step that ends a row: reads
//                                                            // nothing past it; columns past it: any finite value
//       void unpack(__m512i dwords, __m512i (&pairs)[PARTS]) const;
//   };
//
//   tile [pair of columns][32 rows of w] of CHUNK_COLUMNS columns, in L1
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

constexpr int LANES = 16;
constexpr int TILE_LANES = 2 * LANES;
constexpr int CHUNK_COLUMNS = 512;
constexpr int CHUNK_PAIRS = CHUNK_COLUMNS / 2;

// Calls use(integral constant) for 0 .. N - 1. A loop would be unrolled too late for GCC 12 to keep an array that it
// indexes in registers.
template <class Use, int... I>
LLMKERN_INLINE void unrolled(std::integer_sequence<int, I...>, Use use) {
    (use(std::integral_constant<int, I>()), ...);
}
template <int N, class Use>
LLMKERN_INLINE void unrolled(Use use) {
    unrolled(std::make_integer_sequence<int, N>(), use);
}

// Rows and columns of a 16 x 16 matrix of dwords exchanged.
LLMKERN_INLINE void transpose_dwords(__m512i (&v)[LANES]) {
    __m512i t[LANES];
    unrolled<4>([&](auto block) __attribute__((always_inline)) {  // 4 x 4 blocks within each 128-bit part
        constexpr int i = 4 * block;
        const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    });
    unrolled<4>([&](auto i) __attribute__((always_inline)) {  // then the 4 x 4 parts
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xee);
        v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
        v[i + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    });
}

LLMKERN_INLINE __mmask16 lanes_mask(int64_t n) { return static_cast<__mmask16>(n >= LANES ? 0xffff : (1 << n) - 1); }
LLMKERN_INLINE __mmask32 words_mask(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
LLMKERN_INLINE __mmask64 bytes_mask(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// The sums of row m of x over the columns of each group.
inline void sum_groups(const LinearArgs& a, const GroupArgs& g, int64_t m, float* sums) {
    const int64_t groups = (a.k + g.group_size - 1) / g.group_size;
    const auto* x = static_cast<const uint16_t*>(a.x) + m * a.k;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t c0 = group * g.group_size, c1 = c0 + g.group_size < a.k ? c0 + g.group_size : a.k;
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t c = c0; c < c1; c += 32) {
            const __m512i v = _mm512_maskz_loadu_epi16(words_mask(c1 - c), x + c);
            low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)));
            high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536))));
        }
        sums[group] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    }
}

// values [n, groups] of ROWS rows from n0 as [group][ROWS], converted; rows from n on repeat the last one.
template <int ROWS>
void spread_groups(float* to, const void* values, DType dtype, int64_t groups, int64_t n0, int64_t n) {
    for (int first = 0; first < ROWS; first += LANES)
        for (int64_t g = 0; g < groups; g += LANES) {
            const int64_t here = groups - g < LANES ? groups - g : LANES;
            __m512i v[LANES];
            for (int i = 0; i < LANES; ++i) {
                const int64_t row = n0 + first + i < n ? n0 + first + i : n - 1;
                v[i] = _mm512_castps_si512(load_as(values, dtype, row * groups + g, static_cast<int>(here)).v);
            }
            transpose_dwords(v);
            for (int64_t i = 0; i < here; ++i) _mm512_storeu_si512(to + (g + i) * ROWS + first, v[i]);
        }
}

// One step of 16 rows as pairs, tile[pair][32 lanes] from lane 0 on.
template <class Pairs>
LLMKERN_INLINE void unpack_step(const Pairs& weight, __m512i (&v)[LANES], uint32_t* tile) {
    transpose_dwords(v);
    unrolled<LANES>([&](auto i) __attribute__((always_inline)) {
        __m512i pairs[Pairs::PARTS];
        weight.unpack(v[i], pairs);
        for (int j = 0; j < Pairs::PARTS; ++j) _mm512_store_si512(tile + Pairs::place(i, j) * TILE_LANES, pairs[j]);
    });
}

// The columns of the next chunk of 16 rows.
template <class Pairs>
void decode_pairs(const Pairs& weight, typename Pairs::Cursor (&at)[LANES], int64_t columns, uint32_t* tile) {
    for (auto& cursor : at) weight.chunk(cursor, columns);
    for (; columns >= Pairs::COLUMNS; columns -= Pairs::COLUMNS) {
        __m512i v[LANES];
        unrolled<LANES>([&](auto i) __attribute__((always_inline)) { v[i] = weight.step(at[i]); });
        unpack_step(weight, v, tile);
        tile += Pairs::COLUMNS / 2 * TILE_LANES;
    }
    if (columns > 0) {
        __m512i v[LANES];
        for (int i = 0; i < LANES; ++i) v[i] = weight.last(at[i], static_cast<int>(columns));
        unpack_step(weight, v, tile);
    }
}
