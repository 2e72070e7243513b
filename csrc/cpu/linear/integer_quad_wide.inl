// The way of integer.inl for few rows of x on registers of four 128-bit parts: four rows of w at a time, as in
// integer_quad.inl. Along a group every row of w has its own sums; at its end four registers of sums become one, which
// is scaled at once. Its parts keep to their own columns to the end of the row: four more sums for each row of w.
//
//   sums of a group, one register per row of w         [part][row of w]
//     n0 | a a a a | a a a a | a a a a | a a a a
//     n1 | b b b b | b b b b | b b b b | b b b b  ->   a b c d | a b c d | a b c d | a b c d    (* scales of n0..n3 and
//     n2 | c c c c | c c c c | c c c c | c c c c                                                 x, to the fp32 totals)
//     n3 | d d d d | d d d d | d d d d | d d d d
//
//   totals of four rows of x                           [row of x][row of w]
//     m0 | a b c d | a b c d | a b c d | a b c d  ->   m0: a b c d | m1: a b c d | m2: a b c d | m3: a b c d
//
// The sums of a group start at -OFFSET * (the sum of its codes of x). Zero points multiply that sum instead, after the
// four registers became one.
//
// A level gives a Dot per format:
//
//   struct Dot {
//       static constexpr bool FAST;         // false: the level has none, and nothing else is there
//       BYTES, COLUMNS                      // a block: bytes of a row, and the columns in them
//       STREAM_ROWS                         // up to so many rows of x this way costs less than tiles
//       OFFSET                              // load() gives unsigned codes q + OFFSET
//       Weights load(p)                     // a block of one row
//       I32 add(I32, Weights, x)            // part l collects columns [l * COLUMNS / 4, (l + 1) * COLUMNS / 4)
//       I32 sums(x)                         // those of x's codes alone
//       arrange(from, to)                   // a block of x's codes, in the order of add()
//   };
//
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

enum class Groups {
    WHOLE,    // one per row: int32 sums to its end, exact
    RUN,      // of several blocks
    BLOCK,    // of one block
    HALF,     // two in a block
    QUARTER,  // four in a block: one in each part
    LANES,    // of one or two lanes: integer_lanes_wide.inl
};

constexpr bool in_parts(Groups groups) { return groups == Groups::HALF || groups == Groups::QUARTER; }

// Whether lanes of a step have values of their own.
constexpr bool by_lane(Groups groups) { return in_parts(groups) || groups == Groups::LANES; }

constexpr int QUAD = 4, QUAD_X_ROWS = 4;

// Up to so many rows of x, sums along rows of w as stored cost less than tiles.
template <class Dot>
constexpr int64_t STREAM_ROWS = Dot::STREAM_ROWS;

// Values of a step for one row of x: one, or one for each lane; WHOLE has one for each row of w.
constexpr int step_values(Groups groups) { return by_lane(groups) ? F32::WIDTH : groups == Groups::WHOLE ? QUAD : 1; }

// Quads that are multiplied before what they gave is stored, so that y's rows are stored in vectors.
constexpr int64_t QUADS_TAKEN = 16;
// Bytes of x that stay in L1 beside the rows of w that go by.
constexpr int64_t QUAD_X_BYTES = 32 * 1024;
// How far ahead of its reading a stream of weights is asked for, in bytes; 4 KiB and none measured slower.
constexpr int64_t INTEGER_AHEAD = 1024;

// x of a call, in passes of up to four rows that are multiplied together, so that one pointer leads to all four. A step
// is what one set of scales serves: a group, or a block of several groups.
struct QuadX {
    int8_t* codes;  // [pass][blocks][row][COLUMNS]
    int32_t*
        starts;     // [pass][steps][row] sums of the codes, without zero points times -OFFSET; each lane's own in parts
    float* scales;  // [pass][steps][row]; each lane's own in parts
    int64_t codes_size, steps_size;  // of a pass
    int64_t rows, passes;

    // Passes take about the same rows of x.
    int64_t first(int64_t pass) const { return rows * pass / passes; }
    int64_t pass_of(int64_t row) const { return ((row + 1) * passes - 1) / rows; }
};

// Four rows of w, one of each of four parts of a task's rows, far from each other. The processor then sees four long
// streams; neighbouring rows, read side by side, come at less of the bandwidth.
struct QuadW {
    const uint8_t* bytes;
    int64_t stride;                // from a row to the next one here
    const float* scales;           // [groups][QUAD]
    const int32_t* offsets;        // [groups][QUAD] -(OFFSET + zero point); WHOLE and with zero points
    const GroupArgs* stored;       // LANES: scales and zero points as stored. The first row's are from `group` on,
    int64_t group, next_group;     // and those of the next row here so much further
    int64_t groups, block_groups;  // of a row, and of a block
    int64_t blocks, whole_blocks, steps, step_blocks;
    int64_t begin, end;   // WHOLE: the blocks that are multiplied now
    const uint8_t* last;  // [QUAD][BYTES]: the block after the whole ones
};

template <Groups GROUPS>
LLMKERN_INLINE F32 step_scales(const float* scales, int64_t step) {
    if (GROUPS == Groups::QUARTER) return load(scales + step * 4 * QUAD);
    return GROUPS == Groups::HALF ? load_in_halves(scales + step * 2 * QUAD) : load_in_parts(scales + step * QUAD);
}

// A step's zero points times the sums of x's codes, [part][row of w].
template <Groups GROUPS>
LLMKERN_INLINE I32 step_offset(const int32_t* offsets, const int32_t* starts, int64_t step) {
    if (GROUPS == Groups::QUARTER) return load_i32(starts) * load_i32(offsets + step * 4 * QUAD);
    if (GROUPS == Groups::HALF) return load_i32(starts) * load_in_halves(offsets + step * 2 * QUAD);
    return set1_i32(*starts) * load_in_first_part(offsets + step * QUAD);
}

// Block b of four rows of w. What is read next is asked for: AHEAD bytes further, or, where there are more passes over
// these rows, the rows `next`.
template <class Dot, int64_t AHEAD>
LLMKERN_INLINE void load_quad_block(const QuadW& w, int64_t b, const uint8_t* const (&next)[2],
                                    typename Dot::Weights (&codes)[QUAD]) {
    const bool whole = b < w.whole_blocks;
    const uint8_t* p = whole ? w.bytes + b * Dot::BYTES : w.last;
    const int64_t stride = whole ? w.stride : Dot::BYTES;
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; ++r) {
        codes[r] = Dot::load(p);
        if (AHEAD) prefetch(p + AHEAD);
        p = next_address(p, stride);
    }
    if (!AHEAD)
        for (const uint8_t* row : next) prefetch_far(row + b * Dot::BYTES);
}

#include "cpu/linear/integer_lanes_wide.inl"

// The scaled dot products of four rows of w and M of x, [row of x][row of w]; WHOLE: their int32 sums at `sums_at`, to
// which more blocks are added until these are the last ones.
template <class Dot, Groups GROUPS, bool ZEROS, int64_t AHEAD, int M>
LLMKERN_INLINE F32 multiply_quad(const QuadW& w, const int8_t* x, const int32_t* starts, const float* x_scales,
                                 const uint8_t* const (&next)[2], const float* sums_at) {
    const auto add_block = [&](I32(&sums)[QUAD], const typename Dot::Weights(&codes)[QUAD], int m, int64_t b)
                               __attribute__((always_inline)) {
                                   const int8_t* at = x + (b * QUAD_X_ROWS + m) * Dot::COLUMNS;
#pragma GCC unroll 4
                                   for (int r = 0; r < QUAD; ++r) sums[r] = Dot::add(sums[r], codes[r], at);
                               };
    if constexpr (GROUPS == Groups::LANES) {
        return multiply_lanes<Dot, ZEROS, AHEAD, M>(w, x, starts, x_scales, next);
    } else if constexpr (GROUPS == Groups::WHOLE) {
        I32 sums[M][QUAD];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < QUAD; ++r) sums[m][r] = set1_i32(0);
        for (int64_t b = w.begin; b < w.end; ++b) {
            typename Dot::Weights codes[QUAD];
            load_quad_block<Dot, AHEAD>(w, b, next, codes);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) add_block(sums[m], codes, m, b);
        }
        I32 dots[QUAD_X_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < QUAD_X_ROWS; ++m) dots[m] = m < M ? sums_of_rows(sums[m < M ? m : 0]) : set1_i32(0);
        I32 sum = sums_of_parts(dots);
        if (w.begin > 0) sum = sum + as_dwords(load(sums_at));
        if (w.end < w.blocks) return as_floats(sum);
        const I32 offset = load_i32(starts) * load_in_parts(w.offsets);
        return to_float(sum + offset) * load(x_scales) * load_in_parts(w.scales);
    } else {
        F32 totals[QUAD_X_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < QUAD_X_ROWS; ++m) totals[m] = zero();
        int64_t b = 0;
        for (int64_t step = 0; step < w.steps; ++step) {
            const F32 scales = step_scales<GROUPS>(w.scales, step);
            const auto start = [&](int m) __attribute__((always_inline)) {
                const int32_t* at = starts + (step * QUAD_X_ROWS + m) * step_values(GROUPS);
                if (ZEROS) return set1_i32(0);
                return in_parts(GROUPS) ? load_i32(at) : load_in_first_lane(at);
            };
            const auto finish = [&](const I32(&sums)[QUAD], int m) __attribute__((always_inline)) {
                const int64_t at = (step * QUAD_X_ROWS + m) * step_values(GROUPS);
                I32 dots = sums_of_rows(sums);
                if (ZEROS) dots = dots + step_offset<GROUPS>(w.offsets, starts + at, step);
                const F32 x_scale = in_parts(GROUPS) ? load(x_scales + at) : set1(x_scales[at]);
                totals[m] = fma(to_float(dots), scales * x_scale, totals[m]);
            };
            typename Dot::Weights codes[QUAD];
            if constexpr (GROUPS == Groups::RUN) {
                I32 sums[M][QUAD];
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m)
                    for (int r = 0; r < QUAD; ++r) sums[m][r] = start(m);
                const int64_t end = w.blocks - b < w.step_blocks ? w.blocks : b + w.step_blocks;
                for (; b < end; ++b) {
                    load_quad_block<Dot, AHEAD>(w, b, next, codes);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) add_block(sums[m], codes, m, b);
                }
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) finish(sums[m], m);
            } else {
                load_quad_block<Dot, AHEAD>(w, step, next, codes);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    I32 sums[QUAD];
#pragma GCC unroll 4
                    for (int r = 0; r < QUAD; ++r) sums[r] = start(m);
                    add_block(sums, codes, m, step);
                    finish(sums, m);
                }
            }
        }
        return sums_of_parts(totals);
    }
}

template <class Dot, Groups GROUPS, bool ZEROS, int64_t AHEAD, int M>
LLMKERN_INLINE F32 multiply_quad_of(int64_t rows, const QuadW& w, const QuadX& x, int64_t pass,
                                    const uint8_t* const (&next)[2], const float* sums) {
    if constexpr (M > 1)
        if (rows < M) return multiply_quad_of<Dot, GROUPS, ZEROS, AHEAD, M - 1>(rows, w, x, pass, next, sums);
    return multiply_quad<Dot, GROUPS, ZEROS, AHEAD, M>(w, x.codes + pass * x.codes_size, x.starts + pass * x.steps_size,
                                                       x.scales + pass * x.steps_size, next, sums);
}

// Four rows of w times all rows of x: results[pass] = [row of x][row of w].
template <class Dot, Groups GROUPS, bool ZEROS>
void multiply_quads(const QuadW& w, const QuadX& x, int64_t row_bytes, float* results) {
    constexpr int M = QUAD_X_ROWS;
    if (x.passes == 1)
        return store(results, multiply_quad_of<Dot, GROUPS, ZEROS, INTEGER_AHEAD, M>(x.rows, w, x, 0, {}, results));
    for (int64_t pass = 0; pass < x.passes; ++pass) {
        // Each pass asks for its share of the rows that follow, which for two passes is two of the four.
        const uint8_t* first = w.bytes + 2 * row_bytes + QUAD * pass / x.passes * w.stride;
        const uint8_t* const next[2] = {first, first + (x.passes < QUAD ? w.stride : 0)};
        const int64_t rows = x.first(pass + 1) - x.first(pass);
        float* at = results + pass * F32::WIDTH;
        store(at, multiply_quad_of<Dot, GROUPS, ZEROS, 0, M>(rows, w, x, pass, next, at));
    }
}

// Row i of quantized x as the blocks want it.
template <class Dot, Groups GROUPS>
void arrange_quad(const QuadX& x, int64_t i, const int8_t* codes, const float* scales, const QuadW& w, int64_t x_group,
                  int64_t x_groups, bool zeros) {
    constexpr int VALUES = step_values(GROUPS), LANE = Dot::COLUMNS / F32::WIDTH, SHARE = in_parts(GROUPS) ? 4 : 1;
    const int64_t pass = x.pass_of(i), row = i - x.first(pass);
    int8_t* to = x.codes + pass * x.codes_size + row * Dot::COLUMNS;
    const I32 times = set1_i32(zeros || GROUPS == Groups::WHOLE ? 1 : -Dot::OFFSET);
    for (int64_t b = 0, step = 0; b < w.blocks; ++step) {
        const int64_t first = b * Dot::COLUMNS, end = w.blocks - b < w.step_blocks ? w.blocks : b + w.step_blocks;
        I32 sums = set1_i32(0);
        for (; b < end; ++b, to += QUAD_X_ROWS * Dot::COLUMNS) {
            Dot::arrange(codes + b * Dot::COLUMNS, to);
            sums = sums + Dot::sums(to);
        }
        const int64_t at = pass * x.steps_size + (step * QUAD_X_ROWS + row) * VALUES;
        if (in_parts(GROUPS) && zeros)
            store_i32(x.starts + at, sums_of_rows({sums, sums, sums, sums}));
        else if (by_lane(GROUPS))
            store_i32(x.starts + at, sums * times);
        else
            for (int v = 0; v < VALUES; ++v) x.starts[at + v] = hsum(sums * times);
        for (int v = 0; v < VALUES; ++v) {
            const int64_t column = first + (by_lane(GROUPS) ? v / SHARE * SHARE * LANE : 0);
            x.scales[at + v] = column / x_group < x_groups ? scales[column / x_group] : 0;
        }
    }
}

// The scales and offsets of the quads that are taken together. A row's groups may end within its last step.
class QuadScales {
  public:
    QuadScales(const GroupArgs& g, int64_t step_groups, int32_t offset, bool with_offsets)
        : g_(g),
          offset_(offset),
          with_offsets_(with_offsets),
          groups_(div_up(g.k, g.group_size)),
          whole_(round_up(groups_, step_groups)),
          room_(round_up(QUADS_TAKEN * groups_, F32::WIDTH) + 2 * F32::WIDTH) {}

    int64_t bytes() const { return 4 * Carver::bytes<float>(room_ * QUAD); }

    void take_memory(Carver& carve) {
        rows_ = carve.take<int32_t>(room_ * QUAD);
        scales_ = carve.take<float>(room_ * QUAD);
        offsets_ = carve.take<int32_t>(room_ * QUAD);
        one_ = carve.take<float>(room_ * QUAD);
    }

    // Rows n + r * step + i of w for r < QUAD, i < taken.
    void take(int64_t n, int64_t step, int64_t taken) {
        const int64_t count = taken * groups_;
        if (with_offsets_) {
            for (int r = 0; r < QUAD; ++r) {
                const int64_t first = (n + r * step) * groups_;
                for (int64_t i = 0; i < count; ++i)
                    rows_[r * room_ + i] = -offset_ - (g_.zeros ? g_.zeros[first + i] : 0);
            }
            interleave_rows(rows_, room_, count, offsets_);
        }
        float* rows = reinterpret_cast<float*>(rows_);
        for (int r = 0; r < QUAD; ++r)
            convert_row(rows + r * room_, g_.scales, g_.scales_dtype, (n + r * step) * groups_, count);
        interleave_rows(rows_, room_, count, reinterpret_cast<int32_t*>(scales_));
    }

    // Quad i of them. Scales beyond a row's last one are 0, since the next row's could be NaN.
    void give(int64_t i, QuadW& w) {
        w.scales = scales_ + i * groups_ * QUAD;
        w.offsets = offsets_ + i * groups_ * QUAD;
        if (whole_ == groups_) return;
        for (int64_t j = 0; j < groups_ * QUAD; j += F32::WIDTH) store(one_ + j, load(w.scales + j));
        store(one_ + groups_ * QUAD, zero());
        w.scales = one_;
    }

  private:
    const GroupArgs& g_;
    int32_t offset_;
    bool with_offsets_;
    int64_t groups_, whole_;  // of a row; and those of whole steps
    int64_t room_;
    int32_t* rows_;     // [QUAD][room], as stored
    float* scales_;     // [QUADS_TAKEN][groups][QUAD]
    int32_t* offsets_;  // likewise
    float* one_;        // a quad's scales to the end of its last step
};

// y of the quads that were taken together: of rows n + r * step + i of w for r < count, i < taken.
LLMKERN_INLINE void store_quads(const LinearArgs& a, const QuadX& x, const float* results, int64_t n, int64_t step,
                                int count, int64_t taken) {
    for (int64_t pass = 0; pass < x.passes; ++pass) {
        F32 columns[F32::WIDTH];
        for (int64_t i = 0; i < F32::WIDTH; ++i) columns[i] = load(results + (i * x.passes + pass) * F32::WIDTH);
        turn(columns);
        const int64_t m0 = x.first(pass), rows = x.first(pass + 1) - m0;
        for (int r = 0; r < count; ++r) {
            const int lanes = static_cast<int>(taken);
            const F32 bias = a.bias ? load_as(a.bias, a.bias_dtype, n + r * step, lanes) : zero();
            for (int64_t m = 0; m < rows; ++m)
                store_as(a.y, a.x_dtype, (m0 + m) * a.n + n + r * step, columns[m * QUAD + r] + bias, lanes);
        }
    }
}

template <Groups GROUPS, bool ZEROS, class Rows>
void run_quads(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Dot = typename Rows::Dot;
    constexpr int STEP_GROUPS = GROUPS == Groups::QUARTER ? 4 : GROUPS == Groups::HALF ? 2 : 1;
    constexpr bool CONVERTED = GROUPS != Groups::LANES;  // scales are, beforehand
    QuadW shape;
    shape.blocks = div_up(a.k, Dot::COLUMNS);
    shape.step_blocks = GROUPS == Groups::WHOLE ? shape.blocks
                        : GROUPS == Groups::RUN ? g.group_size / Dot::COLUMNS
                                                : 1;
    shape.steps = div_up(shape.blocks, shape.step_blocks);
    shape.stored = &g;
    shape.groups = div_up(a.k, g.group_size);
    shape.block_groups = Dot::COLUMNS / g.group_size;
    shape.whole_blocks = weight.row_bytes() / Dot::BYTES;
    QuadX x;
    x.rows = a.m;
    x.passes = div_up(a.m, QUAD_X_ROWS);
    x.codes_size = QUAD_X_ROWS * shape.blocks * Dot::COLUMNS;
    x.steps_size = QUAD_X_ROWS * shape.steps * step_values(GROUPS);
    Carver carve(scratch(Scratch::CALL, Carver::bytes<int8_t>(x.passes * x.codes_size) +
                                            2 * Carver::bytes<float>(x.passes * x.steps_size)));
    x.codes = carve.take<int8_t>(x.passes * x.codes_size);
    x.starts = carve.take<int32_t>(x.passes * x.steps_size);
    x.scales = carve.take<float>(x.passes * x.steps_size);
    quantize_rows(a, x_group, 0, a.m, threads, [&](int64_t i, const int8_t* codes, const float* scales) {
        arrange_quad<Dot, GROUPS>(x, i, codes, scales, shape, x_group, div_up(a.k, x_group), ZEROS);
    });

    // Where one pass is all there is, or sums are scaled on the way, rows are taken whole.
    const int64_t fit = QUAD_X_BYTES / (x.passes * QUAD_X_ROWS * Dot::COLUMNS);
    const int64_t run_blocks =
        GROUPS != Groups::WHOLE || x.passes == 1 ? shape.blocks : div_up(shape.blocks, div_up(shape.blocks, fit));
    parallel_for(div_up(a.n, QUAD), threads, [&](int64_t begin, int64_t end) {
        const int64_t results_ld = x.passes * F32::WIDTH, row_bytes = weight.row_bytes(), left = row_bytes % Dot::BYTES;
        QuadScales scales(g, STEP_GROUPS, Dot::OFFSET, ZEROS || GROUPS == Groups::WHOLE);
        Carver task(
            scratch(Scratch::TASK, (CONVERTED ? scales.bytes() : 0) + Carver::bytes<float>(QUADS_TAKEN * results_ld)));
        if (CONVERTED) scales.take_memory(task);
        float* results = task.take<float>(QUADS_TAKEN * results_ld);
        uint8_t last[QUAD][Dot::BYTES];
        const auto multiply = [&](int64_t n, int64_t step, int count, int64_t taken) {
            if (CONVERTED) scales.take(n, step, taken);
            QuadW w = shape;
            w.stride = step * row_bytes;
            w.next_group = step * w.groups;
            w.last = last[0];
            for (w.begin = 0; w.begin < w.blocks; w.begin = w.end) {
                w.end = w.blocks - w.begin < run_blocks ? w.blocks : w.begin + run_blocks;
                for (int64_t i = 0; i < taken; ++i) {
                    w.bytes = weight.row(n + i);
                    for (int r = 0; left && r < QUAD; ++r)
                        copy_part(w.bytes + r * w.stride + row_bytes - left, left, last[r]);
                    w.group = (n + i) * w.groups;
                    if (CONVERTED) scales.give(i, w);
                    multiply_quads<Dot, GROUPS, ZEROS>(w, x, row_bytes, results + i * results_ld);
                }
            }
            store_quads(a, x, results, n, step, count, taken);
        };
        const int64_t row = begin * QUAD, rows = (end * QUAD < a.n ? end * QUAD : a.n) - row, part = rows / QUAD;
        for (int64_t i = 0; i < part; i += QUADS_TAKEN)
            multiply(row + i, part, QUAD, part - i < QUADS_TAKEN ? part - i : QUADS_TAKEN);
        for (int64_t n = row + QUAD * part; n < row + rows; ++n) multiply(n, 0, 1, 1);
    });
}

// False if the groups are no such part of a block, and no whole blocks.
template <class Rows>
bool run_integer_fast(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    constexpr int COLUMNS = Rows::Dot::COLUMNS;
    const auto run = [&](auto groups) {
        if (g.zeros && groups.value != Groups::WHOLE)
            run_quads<groups.value, true>(a, g, x_group, weight, threads);
        else
            run_quads<groups.value, false>(a, g, x_group, weight, threads);
    };
    if (g.group_size >= a.k)
        run(std::integral_constant<Groups, Groups::WHOLE>());
    else if (g.group_size == COLUMNS)
        run(std::integral_constant<Groups, Groups::BLOCK>());
    else if (g.group_size % COLUMNS == 0)
        run(std::integral_constant<Groups, Groups::RUN>());
    else if (g.group_size == COLUMNS / 2)
        run(std::integral_constant<Groups, Groups::HALF>());
    else if (g.group_size == COLUMNS / 4)
        run(std::integral_constant<Groups, Groups::QUARTER>());
    else if (g.group_size == COLUMNS / 8 || g.group_size == COLUMNS / 16)
        run(std::integral_constant<Groups, Groups::LANES>());
    else
        return false;
    return true;
}
