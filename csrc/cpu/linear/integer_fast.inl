// The way of integer.inl for few rows of x on AVX2, for groups of whole lanes: byte dot products of ROWS rows of w and
// X_ROWS of x over blocks of a row. Sums of a block start at -(OFFSET + z) * (the sum of the lane's codes of x), known
// before, so that a lane ends at its exact centred dot product. It is then scaled: the scale vector holds one group
// (groups of whole blocks), or several (SPLIT). int8 with one scale per row skips that and keeps int32 sums to the end
// of the row.
//
// A level gives a Dot per format:
//
//   struct Dot {
//       static constexpr bool FAST;         // false: the level has none, and nothing else is there
//       BYTES, COLUMNS                      // a block: bytes of a row, and the columns in them
//       OFFSET                              // load() gives unsigned codes q + OFFSET
//       ROWS, X_ROWS                        // rows of w and of x whose sums fit the registers together
//       column(p)                           // the column, within a block, of code p of the arranged x
//       Weights load(p)                     // a block of one row
//       I32 add(I32, Weights, x)            // lane l collects columns [l * LANE, (l + 1) * LANE) of the block
//   };
//
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

// Up to so many rows of x, sums along rows of w as stored cost less than tiles.
template <class Dot>
constexpr int64_t STREAM_ROWS = 4;

enum class Groups {
    WHOLE,  // one per row: int32 sums to its end, exact
    ONE,    // of whole blocks: a block has one scale
    SPLIT,  // of whole lanes, several in a block
};

// x as int8 in the order of Dot::column, and what else a block needs; rows are *_ld apart.
struct BlockX {
    int8_t* codes;    // [blocks][COLUMNS]
    int32_t* starts;  // [blocks][WIDTH] sums of each lane's codes; without zero points times -OFFSET; WHOLE: [1], raw
    float* scales;    // [blocks], SPLIT: [blocks][WIDTH]; WHOLE: [1]
    int64_t codes_ld, starts_ld, scales_ld;
};

// How far ahead of its reading a stream of weights is asked for, in bytes; 4 KiB and none measured slower.
constexpr int64_t INTEGER_AHEAD = 1024;

// The rows of the weight that are multiplied together: one of each of ROWS parts of a task's rows, far from each other.
// The processor then sees ROWS long streams; neighbouring rows, read side by side, come at less of the bandwidth.
struct BlockW {
    const uint8_t* bytes;
    int64_t row_bytes, stride;  // bytes of a row; and from a row to the next one here
    float* scales;              // [groups], and WIDTH zeros
    int32_t* offsets;           // [groups] -(OFFSET + zero point), and WIDTH zeros
    int64_t scales_ld;
    int64_t blocks_per_group;   // ONE
    int64_t groups_per_block;   // SPLIT
    int32_t lanes[F32::WIDTH];  // SPLIT: the group of each lane
};

// Calls use(b, p, ld) for every block b of a row: row r's bytes are at p + r * ld, whole also for the last block.
template <class Dot, int R, class Use>
LLMKERN_INLINE void for_blocks(const BlockW& w, Use use) {
    const int64_t whole = w.row_bytes / Dot::BYTES, left = w.row_bytes % Dot::BYTES;
    for (int64_t b = 0; b < whole; ++b) {
        const uint8_t* p = w.bytes + b * Dot::BYTES;
        for (int r = 0; r < R; ++r) prefetch(p + r * w.stride + INTEGER_AHEAD);
        use(b, p, w.stride);
    }
    if (left) {
        uint8_t last[R][Dot::BYTES] = {};
        for (int r = 0; r < R; ++r)
            for (int64_t i = 0; i < left; ++i) last[r][i] = w.bytes[r * w.stride + whole * Dot::BYTES + i];
        use(whole, &last[0][0], int64_t{Dot::BYTES});
    }
}

// out[r][m] = the scaled dot product of row r of w and row m of x.
template <class Dot, Groups GROUPS, bool ZEROS, int R, int M>
LLMKERN_INLINE void multiply_blocks(const BlockW& w, const BlockX& x, float (&out)[R][M]) {
    constexpr int W = F32::WIDTH;
    if constexpr (GROUPS == Groups::WHOLE) {
        I32 sums[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) sums[r][m] = set1_i32(0);
        for_blocks<Dot, R>(w, [&](int64_t b, const uint8_t* p, int64_t ld) __attribute__((always_inline)) {
            typename Dot::Weights codes[R];
            for (int r = 0; r < R; ++r) codes[r] = Dot::load(p + r * ld);
            for (int m = 0; m < M; ++m)
                for (int r = 0; r < R; ++r)
                    sums[r][m] = Dot::add(sums[r][m], codes[r], x.codes + m * x.codes_ld + b * Dot::COLUMNS);
        });
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) {
                const int32_t dot = hsum(sums[r][m]) + w.offsets[r * w.scales_ld] * x.starts[m * x.starts_ld];
                out[r][m] = static_cast<float>(dot) * x.scales[m * x.scales_ld] * w.scales[r * w.scales_ld];
            }
    } else {
        F32 sums[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) sums[r][m] = zero();
        int64_t group = 0, left = w.blocks_per_group;
        for_blocks<Dot, R>(w, [&](int64_t b, const uint8_t* p, int64_t ld) __attribute__((always_inline)) {
            typename Dot::Weights codes[R];
            F32 scale[R];
            I32 offset[R];
            if (GROUPS == Groups::SPLIT) {
                group = b * w.groups_per_block;
            } else if (left-- == 0) {
                ++group;
                left = w.blocks_per_group - 1;
            }
            for (int r = 0; r < R; ++r) {
                codes[r] = Dot::load(p + r * ld);
                const float* s = w.scales + r * w.scales_ld + group;
                const int32_t* o = w.offsets + r * w.scales_ld + group;
                scale[r] = GROUPS == Groups::SPLIT ? permute(load(s), w.lanes) : set1(*s);
                if (ZEROS) offset[r] = GROUPS == Groups::SPLIT ? permute(load_i32(o), w.lanes) : set1_i32(*o);
            }
            for (int m = 0; m < M; ++m) {
                const I32 start = load_i32(x.starts + m * x.starts_ld + b * W);
                const float* s = x.scales + m * x.scales_ld;
                const F32 x_scale = GROUPS == Groups::SPLIT ? load(s + b * W) : set1(s[b]);
                for (int r = 0; r < R; ++r) {
                    const I32 dot = Dot::add(ZEROS ? start * offset[r] : start, codes[r],
                                             x.codes + m * x.codes_ld + b * Dot::COLUMNS);
                    sums[r][m] = fma(to_float(dot), scale[r] * x_scale, sums[r][m]);
                }
            }
        });
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[r][m] = hsum(sums[r][m]);
    }
}

// R rows of w, n, n + n_step, ..., times M rows of x from row i.
template <class Dot, Groups GROUPS, bool ZEROS, int R, int M>
void integer_step(const LinearArgs& a, const BlockW& w, BlockX x, int64_t n, int64_t n_step, int64_t i, int64_t m) {
    x.codes += i * x.codes_ld;
    x.starts += i * x.starts_ld;
    x.scales += i * x.scales_ld;
    float out[R][M];
    multiply_blocks<Dot, GROUPS, ZEROS>(w, x, out);
    for (int r = 0; r < R; ++r) {
        const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n + r * n_step) : 0.0f;
        for (int j = 0; j < M; ++j) store_one(a.y, a.x_dtype, (m + j) * a.n + n + r * n_step, out[r][j] + bias);
    }
}

// R rows of w times all rows of x.
template <class Dot, Groups GROUPS, bool ZEROS, int R>
void integer_rows(const LinearArgs& a, const BlockW& w, const BlockX& x, int64_t rows, int64_t n, int64_t n_step,
                  int64_t m0) {
    int64_t i = 0;
    for (; i + Dot::X_ROWS <= rows; i += Dot::X_ROWS)
        integer_step<Dot, GROUPS, ZEROS, R, Dot::X_ROWS>(a, w, x, n, n_step, i, m0 + i);
    for (; i + 2 <= rows; i += 2) integer_step<Dot, GROUPS, ZEROS, R, 2>(a, w, x, n, n_step, i, m0 + i);
    for (; i < rows; ++i) integer_step<Dot, GROUPS, ZEROS, R, 1>(a, w, x, n, n_step, i, m0 + i);
}

// One row of quantized x as the blocks want it.
template <class Dot, Groups GROUPS>
void arrange_row(const BlockX& x, int64_t i, const int8_t* codes, const float* scales, int64_t blocks, int64_t x_group,
                 int64_t x_groups, bool zeros) {
    constexpr int W = F32::WIDTH, LANE = Dot::COLUMNS / W;
    int8_t* to = x.codes + i * x.codes_ld;
    int32_t* starts = x.starts + i * x.starts_ld;
    float* to_scales = x.scales + i * x.scales_ld;
    int32_t total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        const int8_t* from = codes + b * Dot::COLUMNS;
        for (int p = 0; p < Dot::COLUMNS; ++p) to[b * Dot::COLUMNS + p] = from[Dot::column(p)];
        for (int lane = 0; lane < W; ++lane) {
            int32_t sum = 0;
            for (int j = 0; j < LANE; ++j) sum += from[lane * LANE + j];
            total += sum;
            if (GROUPS != Groups::WHOLE) starts[b * W + lane] = zeros ? sum : -Dot::OFFSET * sum;
            if (GROUPS == Groups::SPLIT) {
                const int64_t group = (b * Dot::COLUMNS + lane * LANE) / x_group;
                to_scales[b * W + lane] = group < x_groups ? scales[group] : 0;
            }
        }
        if (GROUPS == Groups::ONE) to_scales[b] = scales[b * Dot::COLUMNS / x_group];
    }
    if (GROUPS == Groups::WHOLE) {
        starts[0] = total;
        to_scales[0] = scales[0];
    }
}

template <Groups GROUPS, bool ZEROS, class Rows>
void run_blocks(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Dot = typename Rows::Dot;
    constexpr int W = F32::WIDTH;
    const int64_t blocks = div_up(a.k, Dot::COLUMNS), groups = div_up(a.k, g.group_size);
    const int64_t x_groups = div_up(a.k, x_group);
    for (int64_t m0 = 0; m0 < a.m; m0 += INTEGER_BLOCK_M) {
        const int64_t rows = a.m - m0 < INTEGER_BLOCK_M ? a.m - m0 : INTEGER_BLOCK_M;
        BlockX x;
        x.codes_ld = blocks * Dot::COLUMNS;
        x.starts_ld = GROUPS == Groups::WHOLE ? 1 : blocks * W;
        x.scales_ld = GROUPS == Groups::WHOLE ? 1 : GROUPS == Groups::ONE ? blocks : blocks * W;
        Carver carve(scratch(Scratch::CALL, Carver::bytes<int8_t>(rows * x.codes_ld) +
                                                Carver::bytes<int32_t>(rows * x.starts_ld) +
                                                Carver::bytes<float>(rows * x.scales_ld)));
        x.codes = carve.take<int8_t>(rows * x.codes_ld);
        x.starts = carve.take<int32_t>(rows * x.starts_ld);
        x.scales = carve.take<float>(rows * x.scales_ld);
        quantize_rows(a, x_group, m0, rows, threads, [&](int64_t i, const int8_t* codes, const float* scales) {
            arrange_row<Dot, GROUPS>(x, i, codes, scales, blocks, x_group, x_groups, ZEROS);
        });

        parallel_for(a.n, threads, [&](int64_t begin, int64_t end) {
            constexpr int R = Dot::ROWS;
            BlockW w;
            w.row_bytes = weight.row_bytes();
            w.blocks_per_group = groups > 1 ? g.group_size / Dot::COLUMNS : INT64_MAX;
            w.groups_per_block = GROUPS == Groups::SPLIT ? Dot::COLUMNS / g.group_size : 0;
            for (int lane = 0; lane < W; ++lane)
                w.lanes[lane] = static_cast<int32_t>(lane * (Dot::COLUMNS / W) / g.group_size);
            // Scales are taken for several rows of w at a time, which costs less than row by row. SPLIT reads a vector
            // at any group, and what comes after the last one must be 0.
            constexpr int64_t TAKEN = GROUPS == Groups::SPLIT ? 1 : 16;
            w.scales_ld = TAKEN * groups + W;
            Carver task(scratch(Scratch::TASK,
                                Carver::bytes<float>(R * w.scales_ld) + Carver::bytes<int32_t>(R * w.scales_ld)));
            float* scales = task.take<float>(R * w.scales_ld);
            int32_t* offsets = task.take<int32_t>(R * w.scales_ld);
            // Rows n + i + r * n_step for i < taken and r < count.
            const auto take = [&](int64_t n, int64_t n_step, int64_t taken, int count) {
                for (int r = 0; r < count; ++r) {
                    const int64_t first = (n + r * n_step) * groups, values = taken * groups;
                    float* to = scales + r * w.scales_ld;
                    int32_t* offset = offsets + r * w.scales_ld;
                    convert_row(to, g.scales, g.scales_dtype, first, values);
                    for (int64_t j = values; j < values + W; ++j) to[j] = 0, offset[j] = 0;
                    if (ZEROS || GROUPS == Groups::WHOLE)
                        for (int64_t j = 0; j < values; ++j)
                            offset[j] = -Dot::OFFSET - (g.zeros ? g.zeros[first + j] : 0);
                }
            };
            const auto row = [&](int64_t n, int64_t n_step, int64_t i) {
                w.bytes = weight.row(n + i);
                w.stride = n_step * w.row_bytes;
                w.scales = scales + i * groups;
                w.offsets = offsets + i * groups;
            };
            const int64_t part = (end - begin) / R;
            for (int64_t n = begin; n < begin + part; n += TAKEN) {
                const int64_t taken = begin + part - n < TAKEN ? begin + part - n : TAKEN;
                take(n, part, taken, R);
                for (int64_t i = 0; i < taken; ++i) {
                    row(n, part, i);
                    integer_rows<Dot, GROUPS, ZEROS, R>(a, w, x, rows, n + i, part, m0);
                }
            }
            for (int64_t n = begin + R * part; n < end; ++n) {
                take(n, 0, 1, 1);
                row(n, 0, 0);
                integer_rows<Dot, GROUPS, ZEROS, 1>(a, w, x, rows, n, 0, m0);
            }
        });
    }
}

// False if the groups are not of whole lanes.
template <class Rows>
bool run_integer_fast(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Dot = typename Rows::Dot;
    constexpr int LANE = Dot::COLUMNS / F32::WIDTH;
    if (g.group_size >= a.k) {
        run_blocks<Groups::WHOLE, false>(a, g, x_group, weight, threads);
    } else if (g.group_size % Dot::COLUMNS == 0) {
        if (g.zeros)
            run_blocks<Groups::ONE, true>(a, g, x_group, weight, threads);
        else
            run_blocks<Groups::ONE, false>(a, g, x_group, weight, threads);
    } else if (Dot::COLUMNS % g.group_size == 0 && g.group_size % LANE == 0) {
        if (g.zeros)
            run_blocks<Groups::SPLIT, true>(a, g, x_group, weight, threads);
        else
            run_blocks<Groups::SPLIT, false>(a, g, x_group, weight, threads);
    } else {
        return false;
    }
    return true;
}
