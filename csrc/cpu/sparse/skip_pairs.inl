// Many rows of bf16 x: products of kept pairs alone, half of those of a dense product (as skip.inl, for pairs).
//
// The two kept values of a quad of columns are a pair of bf16 numbers, and what they are multiplied with is one of six
// pairs of columns of x. All six stand ready, with rows of x in the lanes:
//
//   x block, in L1 while the rows of a tile of w pass it:  [quad][01 02 03 12 13 23][V vectors of 16 rows of x]
//   tile, in L2, the same columns of rows of w:            [row][quad] the kept pair, and where its x is in the quad
//
//        kept pair, place --> one broadcast, V multiplications with x[quad][place]     V sums of a row of w in
//        registers
//
// Loads are the limit, two per cycle: V of them are operands of multiplications, and pairs and places are loaded for
// four quads at once. Included inside namespace llmkern::LLMKERN_NS.

constexpr int MOST_X_VECTORS = 4;
constexpr int CHOICES = 6;  // of two of four columns
// Rows of x that are packed at a time: sums are [rows of w in a tile][block of x], in L2.
constexpr int64_t SKIP_BLOCK_ROWS = 256;
constexpr int64_t SKIP_TILE_ROWS = 192;
// Rows between what is asked for and what is decoded, where nothing else hides the way from memory.
constexpr int64_t SKIP_ROWS_AHEAD = 3;

constexpr int quad_bytes(int vectors) { return CHOICES * vectors * 64; }

// Columns of a block of x: 24 KiB of the six pairs, half of L1.
constexpr int x_block_columns(int vectors) { return vectors == 1 ? 256 : vectors == 2 ? 128 : 64; }
constexpr int CHUNK_QUADS = CHUNK_COLUMNS / 4;
constexpr int x_block_quads(int vectors) { return x_block_columns(vectors) / 4; }

// Rows of w at a time: with few vectors 16 sums, with more, 18 or 24.
constexpr int strip_rows(int vectors) { return vectors <= 2 ? 8 : 6; }
constexpr int64_t STRIPS_OF_ALL = 24;  // a multiple of each

// The place of a pair in a quad, in vectors, by its nibble of positions, p0 | p1 << 2. Where each nibble begins.
alignas(64) inline constexpr int32_t PAIR_PLACES[16] = {0, 0, 1, 2, 0, 0, 3, 4, 1, 3, 0, 5, 2, 4, 5, 0};
alignas(64) inline constexpr int32_t QUAD_NIBBLES[16] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};

// Rows of w in a chunk of columns: long runs of each row, for rows are often a page or more apart.
struct KeptTile {
    uint32_t* pairs;   // [block of columns][rows][quad]
    uint16_t* places;  // likewise: byte offsets into a quad of x
    int64_t rows;
};

template <Kept KEPT, int V>
LLMKERN_INLINE void decode_step(const uint8_t* values, const uint8_t* positions, uint32_t* pairs, uint16_t* places) {
    _mm512_store_si512(pairs, kept_words<KEPT>(values));
    const __m512i nibbles = _mm512_set1_epi64(static_cast<int64_t>(load_word(positions)));
    // The look-up reads the low four bits of a lane.
    const __m512i index = _mm512_multishift_epi64_epi8(_mm512_load_si512(QUAD_NIBBLES), nibbles);
    const __m512i bytes = _mm512_mullo_epi32(_mm512_load_si512(PAIR_PLACES), _mm512_set1_epi32(64 * V));
    const __m512i found = _mm512_permutexvar_epi32(index, bytes);
    _mm256_store_si256(reinterpret_cast<__m256i*>(places), _mm512_cvtepi32_epi16(found));
}

// Where rows of w are read, from a chunk on.
struct KeptRows {
    const uint8_t* values;
    const uint8_t* positions;
    int64_t values_ld, positions_ld;
};

// What the next chunk of a tile reads is asked for line by line, between the strips of the chunk before it.
template <Kept KEPT>
class AskAhead {
  public:
    AskAhead(const KeptRows& w, int64_t rows, int64_t strips)
        : values_(w.values),
          positions_(w.positions),
          values_ld_(w.values_ld),
          positions_ld_(w.positions_ld),
          left_(rows * LINES),
          at_once_(div_up(rows * LINES, strips)) {}

    LLMKERN_INLINE_MEMBER void ask() {
        for (int64_t i = 0; i < at_once_ && left_ > 0; ++i, --left_) {
            prefetch_later(line_ == VALUE_LINES ? positions_ : values_ + line_ * 64);
            if (++line_ == LINES) {
                line_ = 0;
                values_ += values_ld_;
                positions_ += positions_ld_;
            }
        }
    }

  private:
    static constexpr int64_t VALUE_LINES = kept_bytes(KEPT, CHUNK_COLUMNS / 2) / 64, LINES = VALUE_LINES + 1;
    const uint8_t* values_;
    const uint8_t* positions_;
    int64_t values_ld_, positions_ld_, left_, at_once_, line_ = 0;
};

// `columns` columns of `rows` rows; up to the next whole strip the last row is repeated.
template <Kept KEPT, int V>
void decode_rows(const KeptRows& w, int64_t rows, int columns, const KeptTile& to) {
    constexpr int QUADS = x_block_quads(V), BLOCK_STEPS = QUADS / STEP_QUADS;
    const int steps = columns / STEP_COLUMNS, rest = columns % STEP_COLUMNS;
    const int64_t block = to.rows * QUADS;
    const auto place = [&](int step) __attribute__((always_inline)) {
        return step / BLOCK_STEPS * block + step % BLOCK_STEPS * STEP_QUADS;
    };
    for (int64_t r = 0; r < round_up(rows, strip_rows(V)); ++r) {
        const int64_t row = r < rows ? r : rows - 1;
        const uint8_t* values = w.values + row * w.values_ld;
        const uint8_t* positions = w.positions + row * w.positions_ld;
        uint32_t* pairs = to.pairs + r * QUADS;
        uint16_t* places = to.places + r * QUADS;
        for (int64_t i = 0; i < kept_bytes(KEPT, CHUNK_COLUMNS / 2); i += 64)
            prefetch(values + SKIP_ROWS_AHEAD * w.values_ld + i);
        prefetch(positions + SKIP_ROWS_AHEAD * w.positions_ld);
        const auto step = [&](int i) __attribute__((always_inline)) {
            decode_step<KEPT, V>(values + i * STEP_VALUES<KEPT>, positions + i * STEP_POSITIONS, pairs + place(i),
                                 places + place(i));
        };
        if (columns == CHUNK_COLUMNS) {
            unrolled<CHUNK_COLUMNS / STEP_COLUMNS>(step);
        } else {
            for (int i = 0; i < steps; ++i) step(i);
            if (rest) {
                LastStep<KEPT> last;
                last.take(values + steps * STEP_VALUES<KEPT>, positions + steps * STEP_POSITIONS, rest);
                decode_step<KEPT, V>(last.values, last.positions, pairs + place(steps), places + place(steps));
            }
        }
    }
}

// What a multiplication of a tile's rows with a block of x gets.
struct SkipStep {
    const uint32_t* pairs;  // of the tile in the block
    const uint16_t* places;
    int64_t rows;
    const uint8_t* x;
    int first_quad, end_quad;  // those that share a scale
    const float* scales;       // of row i: scales[i * scales_ld], or null
    int64_t scales_ld;
    float* sums;  // [row][16 V]
    bool first;   // sums are set, not added to
};

// sums (+)= scale * (w times x).
template <int V, class Ahead>
void multiply_tile(const SkipStep& s, Ahead& ahead) {
    constexpr int R = strip_rows(V), QUADS = x_block_quads(V);
    constexpr int CHAINS = V == 1 ? 2 : 1;  // so that a sum waits for no other
    for (int64_t row = 0; row < s.rows; row += R) {
        ahead.ask();
        __m512 acc[R][CHAINS][V];
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
            unrolled<CHAINS>([&](auto c) __attribute__((always_inline)) {
                unrolled<V>([&](auto v) __attribute__((always_inline)) { acc[r][c][v] = _mm512_setzero_ps(); });
            });
        });
        const uint32_t* pairs = s.pairs + row * QUADS + s.first_quad;
        const uint16_t* places = s.places + row * QUADS + s.first_quad;
        const uint8_t* at = s.x + s.first_quad * quad_bytes(V);
        for (int q = s.first_quad; q < s.end_quad; q += 4) {
            unrolled<R>([&](auto r) __attribute__((always_inline)) {
                const uint64_t place = load_word(places + r * QUADS);
                const __m512i four =
                    _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(pairs + r * QUADS)));
                unrolled<4>([&](auto i) __attribute__((always_inline)) {
                    const __m512i pair = _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(0x55 * i));
                    const uint8_t* from = at + i * quad_bytes(V) + static_cast<uint16_t>(place >> 16 * i);
                    unrolled<V>([&](auto v) __attribute__((always_inline)) {
                        acc[r][i % CHAINS][v] = add_pairs_at(acc[r][i % CHAINS][v], pair, from + v * 64);
                    });
                });
            });
            pairs += 4;
            places += 4;
            at += 4 * quad_bytes(V);
        }
        float* to = s.sums + row * V * LANES;
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
            const __m512 scale = _mm512_set1_ps(s.scales ? s.scales[(row + r) * s.scales_ld] : 1.0f);
            unrolled<V>([&](auto v) __attribute__((always_inline)) {
                __m512 sum = acc[r][0][v];
                for (int c = 1; c < CHAINS; ++c) sum = _mm512_add_ps(sum, acc[r][c][v]);
                float* p = to + (r * V + v) * LANES;
                _mm512_store_ps(p,
                                s.first ? _mm512_mul_ps(sum, scale) : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(p)));
            });
        });
    }
}

// x of one block of rows: panels [pair of columns][16 V rows of x], padded with zeros to whole steps and vectors.
struct SkipX {
    uint32_t* pairs;
    int64_t rows, panels;
    int64_t depth;  // pairs per row, padded
};

// Pairs [p0, p1) of a panel.
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
                rows[i] = i < count ? _mm512_maskz_loadu_epi16(columns, x + i * a.k + 2 * p) : _mm512_setzero_si512();
            transpose_dwords(rows);
            for (int64_t i = 0; i < LANES; ++i) _mm512_store_si512(out + (p + i) * V * LANES, rows[i]);
        }
    }
}

// The six pairs of each quad from its two pairs of columns.
template <int V>
LLMKERN_INLINE void choose_pairs(const uint32_t* pairs, int quads, uint8_t* to) {
    constexpr __mmask32 HIGH = 0xaaaaaaaa;
    for (int q = 0; q < quads; ++q) {
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

// What a task works in, for tiles of up to `rows` rows, whole strips and vectors.
template <int V>
struct SkipMemory {
    uint8_t* x;
    KeptTile tile;
    float* sums;    // [panel][row of the tile][16 V]
    float* scales;  // [row of the tile][group]

    static size_t bytes(int64_t rows, int64_t panels, int64_t groups) {
        return static_cast<size_t>(
            Carver::bytes<uint8_t>(x_block_quads(V) * quad_bytes(V)) + Carver::bytes<uint32_t>(rows * CHUNK_QUADS) +
            Carver::bytes<uint16_t>(rows * CHUNK_QUADS) + Carver::bytes<float>(panels * rows * V * LANES) +
            Carver::bytes<float>(rows * groups));
    }

    SkipMemory(void* memory, int64_t rows, int64_t panels, int64_t groups) {
        Carver carve(memory);
        x = carve.take<uint8_t>(x_block_quads(V) * quad_bytes(V));
        tile.pairs = carve.take<uint32_t>(rows * CHUNK_QUADS);
        tile.places = carve.take<uint16_t>(rows * CHUNK_QUADS);
        tile.rows = rows;
        sums = carve.take<float>(panels * rows * V * LANES);
        scales = carve.take<float>(rows * groups);
    }
};

// y[m0 .. m0 + x.rows, n0 .. n0 + rows) from the sums, panels sums_ld apart.
template <int V>
void write_skipped(const LinearArgs& a, const SkipX& x, int64_t m0, int64_t n0, int64_t rows, const float* sums,
                   int64_t sums_ld) {
    auto* y = static_cast<uint16_t*>(a.y) + m0 * a.n + n0;
    for (int64_t r = 0; r < rows; r += TILE_LANES) {
        float bias[TILE_LANES] = {};
        if (a.bias) convert_row(bias, a.bias, a.bias_dtype, n0 + r, rows - r < TILE_LANES ? rows - r : TILE_LANES);
        for (int64_t m = 0; m < x.rows; m += LANES) {
            const float* from = sums + m / (V * LANES) * sums_ld + r * V * LANES + m % (V * LANES);
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
               int64_t n0, int64_t rows, const SkipMemory<V>& memory) {
    constexpr int COLUMNS = x_block_columns(V);
    const int64_t groups = div_up(a.k, g.group_size), sums_ld = memory.tile.rows * V * LANES;
    if (g.scales) convert_row(memory.scales, g.scales, g.scales_dtype, n0 * groups, rows * groups);
    const int64_t positions_ld = (a.k + 7) / 8;
    KeptRows at{w.values + n0 * w.row_bytes, w.positions + n0 * positions_ld, w.row_bytes, positions_ld};
    for (int64_t c0 = 0; c0 < a.k; c0 += CHUNK_COLUMNS) {
        const int64_t c1 = c0 + CHUNK_COLUMNS < a.k ? c0 + CHUNK_COLUMNS : a.k;
        decode_rows<KEPT, V>(at, rows, static_cast<int>(c1 - c0), memory.tile);
        at.values += kept_bytes(KEPT, CHUNK_COLUMNS / 2);
        at.positions += CHUNK_COLUMNS / 8;
        AskAhead<KEPT> ahead(at, c1 < a.k ? rows : 0, CHUNK_COLUMNS / COLUMNS * x.panels * div_up(rows, strip_rows(V)));
        for (int64_t k0 = c0; k0 < c1; k0 += COLUMNS) {
            const int64_t k1 = k0 + COLUMNS < c1 ? k0 + COLUMNS : c1, block = (k0 - c0) / 4 * memory.tile.rows;
            for (int64_t panel = 0; panel < x.panels; ++panel) {
                choose_pairs<V>(x.pairs + (panel * x.depth + k0 / 2) * V * LANES,
                                static_cast<int>(round_up(div_up(k1 - k0, 4), 4)), memory.x);
                for_segments(g, k0, k1, [&](const Segment& part) __attribute__((always_inline)) {
                    const SkipStep step{memory.tile.pairs + block,
                                        memory.tile.places + block,
                                        rows,
                                        memory.x,
                                        static_cast<int>(part.first_pair - k0 / 2) / 2,
                                        static_cast<int>(div_up(part.end_pair - k0 / 2, 2)),
                                        g.scales ? memory.scales + part.group : nullptr,
                                        groups,
                                        memory.sums + panel * sums_ld,
                                        part.first_pair == 0};
                    multiply_tile<V>(step, ahead);
                });
            }
        }
    }
    write_skipped<V>(a, x, m0, n0, rows, memory.sums, sums_ld);
}

template <Kept KEPT, int V>
void run_skip_of(const LinearArgs& a, const GroupArgs& g, const TwoOfFourPairs<KEPT>& w, int64_t block_rows) {
    const int threads = worth_threads(a);
    const int64_t groups = div_up(a.k, g.group_size), depth = round_up(a.k, STEP_COLUMNS) / 2;
    const int64_t most = div_up(block_rows, V * LANES);
    const int64_t even = round_up(div_up(a.n, 2 * threads), STRIPS_OF_ALL);
    const int64_t tile = even < SKIP_TILE_ROWS ? even : SKIP_TILE_ROWS, tile_rows = round_up(tile, TILE_LANES);
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
            const SkipMemory<V> memory(scratch(Scratch::TASK, SkipMemory<V>::bytes(tile_rows, x.panels, groups)),
                                       tile_rows, x.panels, groups);
            for (int64_t n0 = begin * tile; n0 < end * tile; n0 += tile)
                skip_tile<KEPT, V>(a, g, w, x, m0, n0, a.n - n0 < tile ? a.n - n0 : tile, memory);
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
