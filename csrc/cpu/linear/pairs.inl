// bf16 x, many rows of it, on machines that multiply pairs of bf16 numbers and add them to an fp32 sum: the weights are
// those of pair_tile.inl, and the scale multiplies the fp32 sums of a group.
//
//   x, packed once: panels [pair of columns][up to PANEL_ROWS rows of x]
//   sums [row of x][32 rows of w]: 2 vectors by PANEL_ROWS in registers over the columns of one group
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// 2 * 14 sums, 2 vectors of the tile and one of x fill the registers.
constexpr int PANEL_ROWS = 14;
// x [block][K] stays in the outer cache while the rows of w go by; the sums, [block][32], in L2.
constexpr int64_t BLOCK_ROWS = 512;

// Columns [begin, end) of one chunk that share a scale; end is even or the row's end.
struct Segment {
    int64_t group, first_pair, end_pair;
};

// Calls use(i, segment) for the segments of columns [c0, c1), which are the i-th of the row from `i` on.
template <class Use>
LLMKERN_INLINE void for_segments(const GroupArgs& g, int64_t c0, int64_t c1, Use use) {
    for (int64_t group = c0 / g.group_size, c = c0; c < c1; ++group) {
        const int64_t end = (group + 1) * g.group_size < c1 ? (group + 1) * g.group_size : c1;
        use(Segment{group, c / 2, (end + 1) / 2});
        c = end;
    }
}

// Whether no pair of columns crosses groups.
LLMKERN_INLINE bool pairs_fit(const GroupArgs& g) { return g.group_size % 2 == 0 || g.group_size >= g.k; }

struct PackedX {
    const uint32_t* pairs;  // panels [k / 2][rows of the panel]; the panel that starts at row m is at m * depth
    const float* sums;      // [row][group]: of x over the group's columns; null if there are no zero points
    int64_t depth;          // pairs per row
    int64_t rows, panels;

    LLMKERN_INLINE_MEMBER int64_t panel_row(int64_t panel) const { return rows * panel / panels; }
};

// Packs pairs [p0, p1) of the rows of one panel, p0 a multiple of 16.
inline void pack_pairs(const LinearArgs& a, int64_t m0, const PackedX& to, int64_t panel, int64_t p0, int64_t p1) {
    const int64_t first = to.panel_row(panel), count = to.panel_row(panel + 1) - first;
    const auto* x = static_cast<const uint16_t*>(a.x) + (m0 + first) * a.k;
    auto* out = const_cast<uint32_t*>(to.pairs) + first * to.depth;
    for (int64_t p = p0; p < p1; p += LANES) {
        __m512i v[LANES];
        const __mmask32 columns = words_mask(a.k - 2 * p);
        for (int64_t i = 0; i < LANES; ++i)
            v[i] = i < count ? _mm512_maskz_loadu_epi16(columns, x + i * a.k + 2 * p) : _mm512_setzero_si512();
        transpose_dwords(v);
        const int64_t here = p1 - p < LANES ? p1 - p : LANES;
        for (int64_t i = 0; i < here; ++i) _mm512_mask_storeu_epi32(out + (p + i) * count, lanes_mask(count), v[i]);
    }
}

// What one step of the multiplication gets: `pairs` pairs of columns of a tile and of a panel of R rows of x.
struct PairStep {
    const uint32_t* tile;
    const uint32_t* x;
    int64_t pairs;
    const float* scales;  // [32]
    float* sums;          // [R][32]
    bool first;           // sums are set, not added to
};

// sums (+)= scales * (tile times x).
template <int R>
void multiply_pairs(const PairStep& s) {
    __m512 acc[R][2];
    unrolled<R>([&](auto r) __attribute__((always_inline)) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
    const uint32_t *tile = s.tile, *x = s.x;
    for (int64_t p = 0; p < s.pairs; ++p) {
        const __m512i w0 = _mm512_load_si512(tile), w1 = _mm512_load_si512(tile + LANES);
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
            const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[r]));
            acc[r][0] = add_pairs(acc[r][0], w0, pair);
            acc[r][1] = add_pairs(acc[r][1], w1, pair);
        });
        tile += TILE_LANES;
        x += R;
    }
    const __m512 scale0 = _mm512_loadu_ps(s.scales), scale1 = _mm512_loadu_ps(s.scales + LANES);
    if (s.first)
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
            _mm512_storeu_ps(s.sums + r * TILE_LANES, _mm512_mul_ps(acc[r][0], scale0));
            _mm512_storeu_ps(s.sums + r * TILE_LANES + LANES, _mm512_mul_ps(acc[r][1], scale1));
        });
    else
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
            float* sum = s.sums + r * TILE_LANES;
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(acc[r][0], scale0, _mm512_loadu_ps(sum)));
            _mm512_storeu_ps(sum + LANES, _mm512_fmadd_ps(acc[r][1], scale1, _mm512_loadu_ps(sum + LANES)));
        });
}

using MultiplyPairs = void (*)(const PairStep&);
constexpr MultiplyPairs MULTIPLY_PAIRS[PANEL_ROWS + 1] = {nullptr,
                                                          multiply_pairs<1>,
                                                          multiply_pairs<2>,
                                                          multiply_pairs<3>,
                                                          multiply_pairs<4>,
                                                          multiply_pairs<5>,
                                                          multiply_pairs<6>,
                                                          multiply_pairs<7>,
                                                          multiply_pairs<8>,
                                                          multiply_pairs<9>,
                                                          multiply_pairs<10>,
                                                          multiply_pairs<11>,
                                                          multiply_pairs<12>,
                                                          multiply_pairs<13>,
                                                          multiply_pairs<14>};

struct PairMemory {
    uint32_t* tile;  // [CHUNK_PAIRS][32]
    float* sums;     // [rows of x][32]
    float* scales;   // [group][32]
    float* zeros;    // likewise, if there are zero points

    static size_t bytes(int64_t rows, int64_t groups) {
        return sizeof(float) * TILE_LANES * static_cast<size_t>(CHUNK_PAIRS + rows + 2 * groups);
    }

    PairMemory(void* memory, int64_t rows, int64_t groups) {
        tile = static_cast<uint32_t*>(memory);
        sums = reinterpret_cast<float*>(tile + CHUNK_PAIRS * TILE_LANES);
        scales = sums + rows * TILE_LANES;
        zeros = scales + groups * TILE_LANES;
    }
};

// y[m0 .. m0 + x.rows, n0 .. n0 + 32) from the sums.
inline void write_pairs(const LinearArgs& a, const PackedX& x, int64_t m0, int64_t n0, const float* sums) {
    const __mmask32 rows = words_mask(a.n - n0);
    float bias[TILE_LANES] = {};
    if (a.bias) convert_row(bias, a.bias, a.bias_dtype, n0, a.n - n0 < TILE_LANES ? a.n - n0 : TILE_LANES);
    auto* y = static_cast<uint16_t*>(a.y) + m0 * a.n + n0;
    for (int64_t m = 0; m < x.rows; ++m) {
        const float* sum = sums + m * TILE_LANES;
        const __m512 low = _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_loadu_ps(bias));
        const __m512 high = _mm512_add_ps(_mm512_loadu_ps(sum + LANES), _mm512_loadu_ps(bias + LANES));
        _mm512_mask_storeu_epi16(y + m * a.n, rows, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
}

// y[m0 .. m0 + x.rows, n0 .. n0 + 32).
template <class Pairs>
void multiply_rows(const LinearArgs& a, const GroupArgs& g, const Pairs& weight, const PackedX& x, int64_t m0,
                   int64_t n0, const PairMemory& memory) {
    const int64_t groups = (a.k + g.group_size - 1) / g.group_size;
    if (g.scales) {
        spread_groups<TILE_LANES>(memory.scales, g.scales, g.scales_dtype, groups, n0, a.n);
    } else {
        for (int i = 0; i < TILE_LANES; ++i) memory.scales[i] = 1;
    }
    if (g.zeros) spread_groups<TILE_LANES>(memory.zeros, g.zeros, DType::I8, groups, n0, a.n);
    typename Pairs::Cursor at[2][LANES];
    for (int i = 0; i < TILE_LANES; ++i) weight.start(at[i / LANES][i % LANES], n0 + i < a.n ? n0 + i : a.n - 1);
    for (int64_t c0 = 0; c0 < a.k; c0 += CHUNK_COLUMNS) {
        const int64_t c1 = c0 + CHUNK_COLUMNS < a.k ? c0 + CHUNK_COLUMNS : a.k;
        for (int half = 0; half < 2; ++half) decode_pairs(weight, at[half], c1 - c0, memory.tile + half * LANES);
        for (int64_t panel = 0; panel < x.panels; ++panel) {
            const int64_t m = x.panel_row(panel), rows = x.panel_row(panel + 1) - m;
            const uint32_t* packed = x.pairs + m * x.depth;
            for_segments(g, c0, c1, [&](const Segment& s) __attribute__((always_inline)) {
                MULTIPLY_PAIRS[rows]({memory.tile + (s.first_pair - c0 / 2) * TILE_LANES, packed + s.first_pair * rows,
                                      s.end_pair - s.first_pair, memory.scales + s.group * TILE_LANES,
                                      memory.sums + m * TILE_LANES, s.first_pair == 0});
            });
        }
    }
    if (g.zeros)  // sum of (code - zero) * scale * x = scale * (sum of code * x - zero * sum of x)
        for (int64_t group = 0; group < groups; ++group) {
            F32 offset[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t i = group * TILE_LANES + half * LANES;
                offset[half] = zero() - load(memory.zeros + i) * load(memory.scales + i);
            }
            for (int64_t m = 0; m < x.rows; ++m)
                for (int half = 0; half < 2; ++half) {
                    float* sum = memory.sums + m * TILE_LANES + half * LANES;
                    store(sum, fma(offset[half], set1(x.sums[m * groups + group]), load(sum)));
                }
        }
    write_pairs(a, x, m0, n0, memory.sums);
}

// y = x @ wᵀ + bias for bf16 x; the groups of g must fit pairs.
template <class Pairs>
void run_pairs(const LinearArgs& a, const GroupArgs& g, const Pairs& weight) {
    const int threads = worth_threads(a);
    const int64_t groups = (a.k + g.group_size - 1) / g.group_size, depth = (a.k + 1) / 2;
    const int64_t most = a.m < BLOCK_ROWS ? a.m : BLOCK_ROWS;
    auto* packed = static_cast<uint32_t*>(
        scratch(Scratch::CALL, sizeof(uint32_t) * static_cast<size_t>(most * (depth + (g.zeros ? groups : 0)))));
    float* sums = g.zeros ? reinterpret_cast<float*>(packed + most * depth) : nullptr;
    for (int64_t m0 = 0; m0 < a.m; m0 += BLOCK_ROWS) {
        const int64_t rows = a.m - m0 < BLOCK_ROWS ? a.m - m0 : BLOCK_ROWS;
        const PackedX x{packed, sums, depth, rows, (rows + PANEL_ROWS - 1) / PANEL_ROWS};
        const int64_t strips = (depth + CHUNK_PAIRS - 1) / CHUNK_PAIRS;
        parallel_for(x.panels * strips, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t p0 = i % strips * CHUNK_PAIRS;
                pack_pairs(a, m0, x, i / strips, p0, p0 + CHUNK_PAIRS < depth ? p0 + CHUNK_PAIRS : depth);
            }
        });
        if (g.zeros)
            parallel_for(rows, threads, [&](int64_t begin, int64_t end) {
                for (int64_t m = begin; m < end; ++m) sum_groups(a, g, m0 + m, sums + m * groups);
            });
        parallel_for((a.n + TILE_LANES - 1) / TILE_LANES, threads, [&](int64_t begin, int64_t end) {
            const PairMemory memory(scratch(Scratch::TASK, PairMemory::bytes(rows, groups)), rows, groups);
            for (int64_t n0 = begin * TILE_LANES; n0 < end * TILE_LANES; n0 += TILE_LANES)
                multiply_rows(a, g, weight, x, m0, n0, memory);
        });
    }
}

// From how many rows of bf16 x on this way is the fastest.
constexpr int64_t PAIRS_FROM_ROWS = 9;

// Whether the arguments are for run_pairs.
LLMKERN_INLINE bool takes_pairs(const LinearArgs& a, const GroupArgs& g) {
    return a.x_dtype == DType::BF16 && a.m >= PAIRS_FROM_ROWS && a.k > 0 && pairs_fit(g) && fast_bf16_products();
}
