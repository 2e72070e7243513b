// The way of integer.inl for few rows of x where byte products take signed codes: four rows of w at a time. Along a
// group every row of w has its own sums; at its end pairwise additions give one register with the four dot products,
// which are scaled together.
//
//   w, as stored                    sums of a group         dot products
//     n0 | 16 bytes | 16 bytes ...    n0 | a a a a
//     n1 |                            n1 | b b b b     ->   a b c d   (* scales of n0..n3 and of x, to the fp32 sums)
//     n2 |                            n2 | c c c c
//     n3 |                            n3 | d d d d
//
// A level gives a Dot per format:
//
//   struct Dot {
//       static constexpr bool FAST;         // false: the level has none, and nothing else is there
//       BYTES, COLUMNS                      // a block: bytes of a row, and the columns in them
//       PARTS                               // registers of codes in a block
//       OFFSET                              // load() gives signed codes q + OFFSET
//       load(p, codes)                      // the codes of a block of one row
//       arrange(from, to)                   // a block of x's codes, in the order of load()
//   };
//
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

constexpr int QUAD = 4;
constexpr int64_t QUAD_X_ROWS = 4;
// Up to so many rows of x, sums along rows of w as stored cost less than tiles.
template <class Dot>
constexpr int64_t STREAM_ROWS = QUAD_X_ROWS;

struct QuadX {
    int8_t* codes;  // [row][blocks][COLUMNS]
    int32_t* sums;  // [row][groups] of the codes, times -OFFSET unless there are zero points
    float* scales;  // [row][x_groups]
    int64_t codes_ld, groups, x_groups;
};

struct QuadW {
    const uint8_t* rows[QUAD];
    const uint8_t* last;  // [QUAD][BYTES]: the block after the whole ones
    float* scales;        // [groups][QUAD]
    int32_t* offsets;     // [groups][QUAD] -(OFFSET + zero point), or null
    int64_t blocks, whole_blocks, group_blocks;
};

template <class Dot, int M>
LLMKERN_INLINE void add_block(I32 (&sums)[M][QUAD], const uint8_t* const (&w)[QUAD], const int8_t* x, int64_t ld) {
    int8x16_t codes[M][Dot::PARTS];
    for (int m = 0; m < M; ++m)
        for (int p = 0; p < Dot::PARTS; ++p) codes[m][p] = vld1q_s8(x + m * ld + 16 * p);
    for (int r = 0; r < QUAD; ++r) {
        int8x16_t mine[Dot::PARTS];
        Dot::load(w[r], mine);
        for (int m = 0; m < M; ++m)
            for (int p = 0; p < Dot::PARTS; ++p) sums[m][r].v = vdotq_s32(sums[m][r].v, mine[p], codes[m][p]);
    }
}

// totals[m] = the scaled dot products of the rows of w with row m of x.
template <class Dot, int M>
LLMKERN_INLINE void multiply_quad(const QuadW& w, const QuadX& x, F32 (&totals)[M]) {
    for (int m = 0; m < M; ++m) totals[m] = zero();
    for (int64_t group = 0, block = 0; group < x.groups; ++group) {
        const int64_t end = w.blocks - block < w.group_blocks ? w.blocks : block + w.group_blocks;
        I32 sums[M][QUAD];
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < QUAD; ++r) sums[m][r] = set1_i32(0);
        for (const int64_t stop = end < w.whole_blocks ? end : w.whole_blocks; block < stop; ++block) {
            const uint8_t* at[QUAD];
            for (int r = 0; r < QUAD; ++r) at[r] = w.rows[r] + block * Dot::BYTES;
            add_block<Dot>(sums, at, x.codes + block * Dot::COLUMNS, x.codes_ld);
        }
        if (block < end) {
            const uint8_t* at[QUAD];
            for (int r = 0; r < QUAD; ++r) at[r] = w.last + r * Dot::BYTES;
            add_block<Dot>(sums, at, x.codes + block * Dot::COLUMNS, x.codes_ld);
        }
        const F32 scales = load(w.scales + group * QUAD);
        for (int m = 0; m < M; ++m) {
            const I32 sum = set1_i32(x.sums[m * x.groups + group]);
            const I32 offset = w.offsets ? sum * load_i32(w.offsets + group * QUAD) : sum;
            const F32 scale = scales * set1(x.scales[m * x.x_groups + (x.x_groups > 1 ? group : 0)]);
            totals[m] = fma(to_float(sums_of_rows(sums[m]) + offset), scale, totals[m]);
        }
    }
}

// x of a call, quantized and arranged.
template <class Dot>
void arrange_quad(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const QuadX& x, int threads) {
    quantize_rows(a, x_group, 0, a.m, threads, [&](int64_t i, const int8_t* codes, const float* scales) {
        for (int64_t k = 0; k < x.codes_ld; k += Dot::COLUMNS) Dot::arrange(codes + k, x.codes + i * x.codes_ld + k);
        for (int64_t j = 0; j < x.x_groups; ++j) x.scales[i * x.x_groups + j] = scales[j];
        for (int64_t j = 0; j < x.groups; ++j) {
            const int64_t k0 = j * g.group_size, k1 = a.k - k0 < g.group_size ? a.k : k0 + g.group_size;
            int32_t sum = 0;
            for (int64_t k = k0; k < k1; ++k) sum += codes[k];
            x.sums[i * x.groups + j] = g.zeros ? sum : -Dot::OFFSET * sum;
        }
    });
}

// Rows [n, n + count) of w; beyond them the last one again, which is never stored.
template <class Dot, class Rows>
void take_quad(const GroupArgs& g, const Rows& weight, int64_t n, int count, int64_t groups, float* row_scales,
               uint8_t* last, QuadW& w) {
    const int64_t whole_bytes = w.whole_blocks * Dot::BYTES;
    for (int r = 0; r < QUAD; ++r) {
        const int64_t row = n + (r < count ? r : count - 1);
        w.rows[r] = weight.row(row);
        for (int64_t i = whole_bytes; i < weight.row_bytes(); ++i)
            last[r * Dot::BYTES + i - whole_bytes] = w.rows[r][i];
        convert_row(row_scales, g.scales, g.scales_dtype, row * groups, groups);
        for (int64_t j = 0; j < groups; ++j) w.scales[j * QUAD + r] = row_scales[j];
        if (g.zeros)
            for (int64_t j = 0; j < groups; ++j) w.offsets[j * QUAD + r] = -Dot::OFFSET - g.zeros[row * groups + j];
    }
}

template <int M, class Rows>
void run_quads(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Dot = typename Rows::Dot;
    const int64_t blocks = div_up(a.k, Dot::COLUMNS), groups = div_up(a.k, g.group_size);
    QuadX x{nullptr, nullptr, nullptr, blocks * Dot::COLUMNS, groups, div_up(a.k, x_group)};
    Carver carve(scratch(Scratch::CALL, Carver::bytes<int8_t>(M * x.codes_ld) + Carver::bytes<int32_t>(M * groups) +
                                            Carver::bytes<float>(M * x.x_groups)));
    x.codes = carve.take<int8_t>(M * x.codes_ld);
    x.sums = carve.take<int32_t>(M * groups);
    x.scales = carve.take<float>(M * x.x_groups);
    arrange_quad<Dot>(a, g, x_group, x, threads);

    parallel_for(div_up(a.n, QUAD), threads, [&](int64_t begin, int64_t end) {
        Carver task(scratch(Scratch::TASK, Carver::bytes<float>(groups) + Carver::bytes<float>(QUAD * groups) +
                                               Carver::bytes<int32_t>(QUAD * groups)));
        float* row_scales = task.take<float>(groups);
        uint8_t last[QUAD * Dot::BYTES] = {};
        QuadW w;
        w.last = last;
        w.scales = task.take<float>(QUAD * groups);
        w.offsets = g.zeros ? task.take<int32_t>(QUAD * groups) : nullptr;
        w.blocks = blocks;
        w.whole_blocks = weight.row_bytes() / Dot::BYTES;
        w.group_blocks = groups > 1 ? g.group_size / Dot::COLUMNS : INT64_MAX;
        for (int64_t n = begin * QUAD; n < a.n && n < end * QUAD; n += QUAD) {
            const int count = static_cast<int>(a.n - n < QUAD ? a.n - n : QUAD);
            take_quad<Dot>(g, weight, n, count, groups, row_scales, last, w);
            F32 totals[M];
            multiply_quad<Dot>(w, x, totals);
            const F32 bias = a.bias ? load_as(a.bias, a.bias_dtype, n, count) : zero();
            for (int m = 0; m < M; ++m) store_as(a.y, a.x_dtype, m * a.n + n, totals[m] + bias, count);
        }
    });
}

// False if the groups are not of whole blocks.
template <class Rows>
bool run_integer_fast(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    if (a.m > QUAD_X_ROWS || (g.group_size < a.k && g.group_size % Rows::Dot::COLUMNS != 0)) return false;
    switch (a.m) {
        case 1:
            run_quads<1>(a, g, x_group, weight, threads);
            break;
        case 2:
            run_quads<2>(a, g, x_group, weight, threads);
            break;
        case 3:
            run_quads<3>(a, g, x_group, weight, threads);
            break;
        case 4:
            run_quads<4>(a, g, x_group, weight, threads);
            break;
    }
    return true;
}
