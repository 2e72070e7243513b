// Many rows of bf16 x: products of kept pairs alone, half of those of a dense product (as skip.inl, for pairs).
//
// The two kept values of a quad of columns are a pair of bf16 numbers, and what they are multiplied with is one of six
// pairs of columns of x. All six stand ready, with rows of x in the lanes:
//
//   x block, in L1 while the rows of a tile of w pass it:  [quad][01 02 03 12 13 23][V vectors of 16 rows of x]
//   w, 4 rows at a time:                                   [row][quad] the kept pair, and where its x is in the quad
//
//        kept pair, place --> one broadcast, V multiplications with x[quad][place]     V sums of a row of w in registers
//
// Loads are the limit, two per cycle: V of them are operands of multiplications, and pairs and places are loaded for
// four quads at once. Included inside namespace llmkern::LLMKERN_NS.

constexpr int STRIP_ROWS = 4;
constexpr int MOST_X_VECTORS = 4;
constexpr int CHOICES = 6;  // of two of four columns
// x that is packed at a time; sums are [rows of w in a tile][block of x].
constexpr int64_t SKIP_BLOCK_ROWS = 256;
constexpr int64_t SKIP_TILE_ROWS = 256;
// Strips between what is asked for and what is read.
constexpr int64_t STRIPS_AHEAD = 8;

constexpr int quad_bytes(int vectors) { return CHOICES * vectors * 64; }

// Columns of a block of x: 24 KiB of the six pairs, half of L1.
constexpr int x_block_columns(int vectors) { return vectors == 1 ? 256 : vectors == 2 ? 128 : 64; }

// The place of a pair in a quad by its nibble of positions, p0 | p1 << 2.
template <int V>
LLMKERN_INLINE __m512i place_table() {
    alignas(64) static constexpr int32_t PLACES[16] = {0, 0,       64 * V,  128 * V, 0,       0,       192 * V, 256 * V,
                                                       64 * V, 192 * V, 0,       320 * V, 128 * V, 256 * V, 320 * V, 0};
    return _mm512_load_si512(PLACES);
}

// 4 rows of w in a block of columns.
template <int V>
struct Strip {
    static constexpr int QUADS = x_block_columns(V) / 4;
    alignas(64) uint32_t pairs[STRIP_ROWS][QUADS];
    alignas(64) uint16_t places[STRIP_ROWS][QUADS];  // byte offsets into a quad of x
};

template <Kept KEPT, int V>
LLMKERN_INLINE void decode_step(const uint8_t* values, const uint8_t* positions, uint32_t* pairs, uint16_t* places) {
    _mm512_store_si512(pairs, kept_words<KEPT>(values));
    const __m512i nibbles = _mm512_set1_epi64(static_cast<int64_t>(load_word(positions)));
    const __m512i shifts = _mm512_setr_epi64(0x0000000400000000, 0x0000000c00000008, 0x0000001400000010, 0x0000001c00000018,
                                             0x0000002400000020, 0x0000002c00000028, 0x0000003400000030, 0x0000003c00000038);
    const __m512i index = _mm512_multishift_epi64_epi8(shifts, nibbles);  // the look-up reads its low four bits
    const __m512i found = _mm512_permutexvar_epi32(index, place_table<V>());
    _mm256_store_si256(reinterpret_cast<__m256i*>(places), _mm512_cvtepi32_epi16(found));
}

// Rows n .. n + 4 of w in columns [k0, k0 + block); rows past the last one repeat it.
template <Kept KEPT, int V>
LLMKERN_INLINE void decode_strip(const LinearArgs& a, const TwoOfFourPairs<KEPT>& w, int64_t n, int64_t k0, Strip<V>& to) {
    const int64_t left = a.k - k0, columns = left < x_block_columns(V) ? left : x_block_columns(V);
    const int64_t steps = columns / STEP_COLUMNS, rest = columns % STEP_COLUMNS;
    for (int r = 0; r < STRIP_ROWS; ++r) {
        const int64_t row = n + r < a.n ? n + r : a.n - 1;
        const uint8_t* values = w.values + row * w.row_bytes + kept_bytes(KEPT, k0 / 2);
        const uint8_t* positions = w.positions + row * ((a.k + 7) / 8) + k0 / 8;
        for (int64_t i = 0; i < steps; ++i)
            decode_step<KEPT, V>(values + i * STEP_VALUES<KEPT>, positions + i * STEP_POSITIONS,
                                 to.pairs[r] + i * STEP_QUADS, to.places[r] + i * STEP_QUADS);
        if (rest) {
            const LastStep<KEPT> last(values + steps * STEP_VALUES<KEPT>, positions + steps * STEP_POSITIONS,
                                      static_cast<int>(rest));
            decode_step<KEPT, V>(last.values, last.positions, to.pairs[r] + steps * STEP_QUADS,
                                 to.places[r] + steps * STEP_QUADS);
        }
    }
}

// Asks for what decode_strip reads.
template <Kept KEPT, int V>
LLMKERN_INLINE void ask_strip(const LinearArgs& a, const TwoOfFourPairs<KEPT>& w, int64_t n, int64_t k0) {
    for (int r = 0; r < STRIP_ROWS; ++r) {
        const uint8_t* values = w.values + (n + r) * w.row_bytes + kept_bytes(KEPT, k0 / 2);
        for (int64_t i = 0; i < kept_bytes(KEPT, x_block_columns(V) / 2); i += 64) prefetch_later(values + i);
        prefetch_later(w.positions + (n + r) * ((a.k + 7) / 8) + k0 / 8);
    }
}

// sums[row][16 V] (+)= scale * (quads [q0, q1) of a strip times those of a block of x).
template <int V>
LLMKERN_INLINE void multiply_strip(const Strip<V>& w, const uint8_t* x, int q0, int q1, const float* scales,
                                   int64_t scales_ld, float* sums, bool first) {
    constexpr int CHAINS = V == 1 ? 4 : V == 2 ? 2 : 1;  // so that a sum waits for no other
    __m512 acc[STRIP_ROWS][CHAINS][V];
    unrolled<STRIP_ROWS>([&](auto r) __attribute__((always_inline)) {
        unrolled<CHAINS>([&](auto c) __attribute__((always_inline)) {
            unrolled<V>([&](auto v) __attribute__((always_inline)) { acc[r][c][v] = _mm512_setzero_ps(); });
        });
    });
    const uint32_t* pairs = w.pairs[0] + q0;
    const uint16_t* places = w.places[0] + q0;
    x += q0 * quad_bytes(V);
    for (int q = q0; q < q1; q += 4) {
        unrolled<STRIP_ROWS>([&](auto r) __attribute__((always_inline)) {
            const uint64_t place = load_word(places + r * Strip<V>::QUADS);
            const __m512i four = _mm512_broadcast_i32x4(
                _mm_load_si128(reinterpret_cast<const __m128i*>(pairs + r * Strip<V>::QUADS)));
            unrolled<4>([&](auto i) __attribute__((always_inline)) {
                const __m512i pair = _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(0x55 * i));
                const uint8_t* from = x + i * quad_bytes(V) + static_cast<uint16_t>(place >> 16 * i);
                unrolled<V>([&](auto v) __attribute__((always_inline)) {
                    acc[r][i % CHAINS][v] = add_pairs_at(acc[r][i % CHAINS][v], pair, from + v * 64);
                });
            });
        });
        pairs += 4;
        places += 4;
        x += 4 * quad_bytes(V);
    }
    unrolled<STRIP_ROWS>([&](auto r) __attribute__((always_inline)) {
        const __m512 scale = _mm512_set1_ps(scales ? scales[r * scales_ld] : 1.0f);
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
            __m512 sum = acc[r][0][v];
            for (int c = 1; c < CHAINS; ++c) sum = _mm512_add_ps(sum, acc[r][c][v]);
            float* to = sums + (r * V + v) * LANES;
            _mm512_store_ps(to, first ? _mm512_mul_ps(sum, scale) : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(to)));
        });
    });
}

// x of one block of rows: panels [pair of columns][16 V rows of x], padded with zeros to whole steps and vectors.
struct SkipX {
    uint32_t* pairs;
    int64_t rows, panels;
    int64_t depth;  // pairs per row, padded
};

// Pairs [p0, p1) of vector v of a panel.
template <int V>
void pack_skip_x(const LinearArgs& a, int64_t m0, const SkipX& to, int64_t panel, int64_t p0, int64_t p1) {
    for (int v = 0; v < V; ++v) {
        const int64_t m = (panel * V + v) * LANES, count = to.rows - m;
        const auto* x = static_cast<const uint16_t*>(a.x) + (m0 + m) * a.k;
        uint32_t* out = to.pairs + panel * V * LANES * to.depth + v * LANES;
        for (int64_t p = p0; p < p1; p += LANES) {
            __m512i rows[LANES];
            const __mmask32 columns = a.k > 2 * p ? words_mask(a.k - 2 * p) : 0;
            for (int64_t i = 0; i < LANES; ++i)
                rows[i] =
                    i < count ? _mm512_maskz_loadu_epi16(columns, x + i * a.k + 2 * p) : _mm512_setzero_si512();
            transpose_dwords(rows);
            for (int64_t i = 0; i < LANES; ++i) _mm512_store_si512(out + (p + i) * V * LANES, rows[i]);
        }
    }
}

// The six pairs of each quad from its two pairs of columns.
template <int V>
LLMKERN_INLINE void choose_pairs(const uint32_t* pairs, int64_t quads, uint8_t* to) {
    constexpr __mmask32 HIGH = 0xaaaaaaaa;
    for (int64_t q = 0; q < quads; ++q) {
        for (int v = 0; v < V; ++v) {
            const __m512i x01 = _mm512_load_si512(pairs + v * LANES), x23 = _mm512_load_si512(pairs + (V + v) * LANES);
            const __m512i x1 = _mm512_srli_epi32(x01, 16), x2 = _mm512_slli_epi32(x23, 16);
            const __m512i choice[CHOICES] = {x01,
                                             _mm512_mask_blend_epi16(HIGH, x01, x2),
                                             _mm512_mask_blend_epi16(HIGH, x01, x23),
                                             _mm512_mask_blend_epi16(HIGH, x1, x2),
                                             _mm512_mask_blend_epi16(HIGH, x1, x23),
                                             x23};
            for (int c = 0; c < CHOICES; ++c) _mm512_store_si512(to + (c * V + v) * 64, choice[c]);
        }
        pairs += 2 * V * LANES;
        to += quad_bytes(V);
    }
}

// What a task works in.
template <int V>
struct SkipMemory {
    uint8_t* x;
    Strip<V>* strips;  // two
    float* sums;       // [panel][row of the tile][16 V]
    float* scales;     // [row of the tile][group], if they are not fp32

    static size_t bytes(int64_t tile, int64_t panels, int64_t groups) {
        return static_cast<size_t>(Carver::bytes<uint8_t>(x_block_columns(V) / 4 * quad_bytes(V)) +
                                   Carver::bytes<Strip<V>>(2) + Carver::bytes<float>(panels * tile * V * LANES) +
                                   Carver::bytes<float>(tile * groups));
    }

    SkipMemory(void* memory, int64_t tile, int64_t panels, int64_t groups) {
        Carver carve(memory);
        x = carve.take<uint8_t>(x_block_columns(V) / 4 * quad_bytes(V));
        strips = carve.take<Strip<V>>(2);
        sums = carve.take<float>(panels * tile * V * LANES);
        scales = carve.take<float>(tile * groups);
    }
};

// y[m0 .. m0 + x.rows, n0 .. n0 + rows) from the sums.
template <int V>
void write_skipped(const LinearArgs& a, const SkipX& x, int64_t m0, int64_t n0, int64_t rows, int64_t tile,
                   const float* sums) {
    auto* y = static_cast<uint16_t*>(a.y) + m0 * a.n + n0;
    for (int64_t r = 0; r < rows; r += TILE_LANES) {
        float bias[TILE_LANES] = {};
        if (a.bias) convert_row(bias, a.bias, a.bias_dtype, n0 + r, rows - r < TILE_LANES ? rows - r : TILE_LANES);
        for (int64_t m = 0; m < x.rows; m += LANES) {
            const float* from = sums + (m / (V * LANES) * tile + r) * V * LANES + m % (V * LANES);
            __m512i low[LANES], high[LANES];
            for (int i = 0; i < LANES; ++i) low[i] = _mm512_load_si512(from + i * V * LANES);
            for (int i = 0; i < LANES; ++i) high[i] = _mm512_load_si512(from + (LANES + i) * V * LANES);
            transpose_dwords(low);
            transpose_dwords(high);
            for (int64_t i = 0; i < LANES && m + i < x.rows; ++i) {
                const __m512 y0 = _mm512_add_ps(_mm512_castsi512_ps(low[i]), _mm512_loadu_ps(bias));
                const __m512 y1 = _mm512_add_ps(_mm512_castsi512_ps(high[i]), _mm512_loadu_ps(bias + LANES));
                _mm512_mask_storeu_epi16(y + (m + i) * a.n + r, words_mask(rows - r),
                                         reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y1, y0)));
            }
        }
    }
}

// y[m0 .. m0 + x.rows, n0 .. n0 + rows).
template <Kept KEPT, int V>
void skip_tile(const LinearArgs& a, const GroupArgs& g, const TwoOfFourPairs<KEPT>& w, const SkipX& x, int64_t m0,
               int64_t n0, int64_t rows, int64_t tile, const SkipMemory<V>& memory) {
    constexpr int COLUMNS = x_block_columns(V);
    const int64_t groups = div_up(a.k, g.group_size), strips = div_up(rows, STRIP_ROWS);
    const float* scales = nullptr;
    if (g.scales && g.scales_dtype == DType::F32) {
        scales = static_cast<const float*>(g.scales) + n0 * groups;
    } else if (g.scales) {
        convert_row(memory.scales, g.scales, g.scales_dtype, n0 * groups, rows * groups);
        scales = memory.scales;
    }
    for (int64_t k0 = 0; k0 < a.k; k0 += COLUMNS) {
        const int64_t k1 = k0 + COLUMNS < a.k ? k0 + COLUMNS : a.k;
        for (int64_t panel = 0; panel < x.panels; ++panel) {
            choose_pairs<V>(x.pairs + (panel * x.depth + k0 / 2) * V * LANES, round_up(div_up(k1 - k0, 4), 4), memory.x);
            decode_strip<KEPT, V>(a, w, n0, k0, memory.strips[0]);
            for (int64_t s = 0; s < strips; ++s) {
                if (panel == 0) {
                    const int64_t ahead = s + STRIPS_AHEAD;
                    if (ahead < strips)
                        ask_strip<KEPT, V>(a, w, n0 + ahead * STRIP_ROWS, k0);
                    else
                        ask_strip<KEPT, V>(a, w, n0 + (ahead - strips) * STRIP_ROWS, k0 + COLUMNS);
                }
                if (s + 1 < strips)
                    decode_strip<KEPT, V>(a, w, n0 + (s + 1) * STRIP_ROWS, k0, memory.strips[(s + 1) % 2]);
                float* sums = memory.sums + (panel * tile + s * STRIP_ROWS) * V * LANES;
                for_segments(g, k0, k1, [&](const Segment& part) __attribute__((always_inline)) {
                    multiply_strip<V>(memory.strips[s % 2], memory.x,
                                      static_cast<int>(part.first_pair - k0 / 2) / 2,
                                      static_cast<int>(div_up(part.end_pair - k0 / 2, 2)),
                                      scales ? scales + s * STRIP_ROWS * groups + part.group : nullptr, groups, sums,
                                      part.first_pair == 0);
                });
            }
        }
    }
    write_skipped<V>(a, x, m0, n0, rows, tile, memory.sums);
}

template <Kept KEPT, int V>
void run_skip_of(const LinearArgs& a, const GroupArgs& g, const TwoOfFourPairs<KEPT>& w, int64_t block_rows) {
    const int threads = worth_threads(a);
    const int64_t groups = div_up(a.k, g.group_size), depth = round_up(a.k, STEP_COLUMNS) / 2;
    const int64_t most = div_up(block_rows, V * LANES);
    const int64_t even = round_up(div_up(a.n, 2 * threads), TILE_LANES);
    const int64_t tile = even < SKIP_TILE_ROWS ? even : SKIP_TILE_ROWS;
    auto* packed = static_cast<uint32_t*>(
        scratch(Scratch::CALL, sizeof(uint32_t) * static_cast<size_t>(most * V * LANES * depth)));
    for (int64_t m0 = 0; m0 < a.m; m0 += block_rows) {
        const int64_t rows = a.m - m0 < block_rows ? a.m - m0 : block_rows;
        const SkipX x{packed, rows, div_up(rows, V * LANES), depth};
        const int64_t parts = div_up(depth, CHUNK_PAIRS);
        parallel_for(x.panels * parts, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t p0 = i % parts * CHUNK_PAIRS;
                pack_skip_x<V>(a, m0, x, i / parts, p0, p0 + CHUNK_PAIRS < depth ? p0 + CHUNK_PAIRS : depth);
            }
        });
        parallel_for(div_up(a.n, tile), threads, [&](int64_t begin, int64_t end) {
            const SkipMemory<V> memory(scratch(Scratch::TASK, SkipMemory<V>::bytes(tile, x.panels, groups)), tile,
                                       x.panels, groups);
            for (int64_t n0 = begin * tile; n0 < end * tile; n0 += tile)
                skip_tile<KEPT, V>(a, g, w, x, m0, n0, a.n - n0 < tile ? a.n - n0 : tile, tile, memory);
        });
    }
}

// y = x @ wᵀ + bias for bf16 x. Groups end where four quads do.
template <Kept KEPT>
void run_skip_pairs(const LinearArgs& a, const GroupArgs& g, const TwoOfFourPairs<KEPT>& w) {
    const int64_t block = a.m < SKIP_BLOCK_ROWS ? a.m : SKIP_BLOCK_ROWS, vectors = div_up(block, LANES);
    switch (div_up(vectors, div_up(vectors, MOST_X_VECTORS))) {  // of a panel: as even a split as possible
        case 1:
            return run_skip_of<KEPT, 1>(a, g, w, block);
        case 2:
            return run_skip_of<KEPT, 2>(a, g, w, block);
        case 3:
            return run_skip_of<KEPT, 3>(a, g, w, block);
        default:
            return run_skip_of<KEPT, 4>(a, g, w, block);
    }
}
