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
//       OFFSET                              // load() gives unsigned codes q + OFFSET
//       Weights load(p, mask)               // a block of one row; bytes that the mask leaves out are not touched
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
};

constexpr bool in_parts(Groups groups) { return groups == Groups::HALF || groups == Groups::QUARTER; }

constexpr int QUAD = 4, QUAD_X_ROWS = 4;
// Quads that are multiplied before what they gave is stored, so that y's rows are stored in vectors.
constexpr int64_t QUADS_TAKEN = 16;
// How far ahead of its reading a stream of weights is asked for, in bytes; 4 KiB and none measured slower.
constexpr int64_t INTEGER_AHEAD = 1024;

// x of a call. A step is what one set of scales serves: a group, or a block of several groups.
struct QuadX {
    int8_t* codes;    // [row][blocks][COLUMNS]
    int32_t* starts;  // [row][steps] sums of the codes, without zero points times -OFFSET; in parts: [row][steps][WIDTH]
    float* scales;    // [row][steps]; in parts: [row][steps][WIDTH]
    int64_t codes_ld, ld;
};

// Four rows of w, one of each of four parts of a task's rows, far from each other. The processor then sees four long
// streams; neighbouring rows, read side by side, come at less of the bandwidth.
struct QuadW {
    const uint8_t* rows[QUAD];
    const float* scales;     // [groups][QUAD]
    const int32_t* offsets;  // [groups][QUAD] -(OFFSET + zero point); WHOLE and with zero points
    int64_t blocks, steps, step_blocks;
    ByteMask last;  // of the last block
};

// Where the next bytes of w are asked for during one of several passes over four rows.
struct QuadAhead {
    int64_t distance;
    int first, last;  // of the four rows

    QuadAhead(int64_t pass, int64_t passes, int64_t row_bytes)
        : distance(passes == 1 ? INTEGER_AHEAD : row_bytes),
          first(static_cast<int>(QUAD * pass / passes)),
          last(static_cast<int>(QUAD * (pass + 1) / passes)) {}
};

template <Groups GROUPS>
LLMKERN_INLINE F32 step_scales(const float* scales, int64_t step) {
    if (GROUPS == Groups::QUARTER) return load(scales + step * 4 * QUAD);
    return GROUPS == Groups::HALF ? load_in_halves(scales + step * 2 * QUAD) : load_in_parts(scales + step * QUAD);
}

// A step's zero points times the sums of x's codes, [part][row of w].
template <Groups GROUPS>
LLMKERN_INLINE I32 step_offset(const int32_t* offsets, const int32_t* starts, int64_t step) {
    if (GROUPS == Groups::QUARTER)
        return load_i32(starts + step * F32::WIDTH) * load_i32(offsets + step * 4 * QUAD);
    if (GROUPS == Groups::HALF)
        return load_i32(starts + step * F32::WIDTH) * load_in_halves(offsets + step * 2 * QUAD);
    return set1_i32(starts[step]) * load_in_first_part(offsets + step * QUAD);
}

// The scaled dot products of four rows of w and M of x, [row of x][row of w].
template <class Dot, Groups GROUPS, bool ZEROS, int M>
LLMKERN_INLINE F32 multiply_quad(const QuadW& w, const QuadX& x, const QuadAhead& ahead) {
    const ByteMask all = first_bytes(Dot::BYTES);
    const auto load_block = [&](int64_t b, typename Dot::Weights(&codes)[QUAD]) __attribute__((always_inline)) {
        const ByteMask mask = b + 1 < w.blocks ? all : w.last;
        for (int r = 0; r < QUAD; ++r) codes[r] = Dot::load(w.rows[r] + b * Dot::BYTES, mask);
        for (int r = ahead.first; r < ahead.last; ++r) prefetch(w.rows[r] + b * Dot::BYTES + ahead.distance);
    };
    const auto add_block = [&](I32(&sums)[QUAD], const typename Dot::Weights(&codes)[QUAD], int m, int64_t b)
        __attribute__((always_inline)) {
        for (int r = 0; r < QUAD; ++r) sums[r] = Dot::add(sums[r], codes[r], x.codes + m * x.codes_ld + b * Dot::COLUMNS);
    };
    if constexpr (GROUPS == Groups::WHOLE) {
        I32 sums[M][QUAD];
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < QUAD; ++r) sums[m][r] = set1_i32(0);
        for (int64_t b = 0; b < w.blocks; ++b) {
            typename Dot::Weights codes[QUAD];
            load_block(b, codes);
            for (int m = 0; m < M; ++m) add_block(sums[m], codes, m, b);
        }
        I32 dots[QUAD_X_ROWS];
        for (int m = 0; m < QUAD_X_ROWS; ++m) dots[m] = m < M ? sums_of_rows(sums[m < M ? m : 0]) : set1_i32(0);
        const I32 offset = load_i32(x.starts) * load_in_parts(w.offsets);
        return to_float(sums_of_parts(dots) + offset) * load(x.scales) * load_in_parts(w.scales);
    } else {
        F32 totals[QUAD_X_ROWS];
        for (int m = 0; m < QUAD_X_ROWS; ++m) totals[m] = zero();
        int64_t b = 0;
        for (int64_t step = 0; step < w.steps; ++step) {
            const F32 scales = step_scales<GROUPS>(w.scales, step);
            const auto start = [&](int m) __attribute__((always_inline)) {
                const int32_t* starts = x.starts + m * x.ld;
                if (ZEROS) return set1_i32(0);
                return in_parts(GROUPS) ? load_i32(starts + step * F32::WIDTH) : in_first_lane(starts[step]);
            };
            const auto finish = [&](const I32(&sums)[QUAD], int m) __attribute__((always_inline)) {
                I32 dots = sums_of_rows(sums);
                if (ZEROS) dots = dots + step_offset<GROUPS>(w.offsets, x.starts + m * x.ld, step);
                const float* s = x.scales + m * x.ld;
                const F32 x_scale = in_parts(GROUPS) ? load(s + step * F32::WIDTH) : set1(s[step]);
                totals[m] = fma(to_float(dots), scales * x_scale, totals[m]);
            };
            typename Dot::Weights codes[QUAD];
            if constexpr (GROUPS == Groups::RUN) {
                I32 sums[M][QUAD];
                for (int m = 0; m < M; ++m)
                    for (int r = 0; r < QUAD; ++r) sums[m][r] = start(m);
                const int64_t end = w.blocks - b < w.step_blocks ? w.blocks : b + w.step_blocks;
                for (; b < end; ++b) {
                    load_block(b, codes);
                    for (int m = 0; m < M; ++m) add_block(sums[m], codes, m, b);
                }
                for (int m = 0; m < M; ++m) finish(sums[m], m);
            } else {
                load_block(step, codes);
                for (int m = 0; m < M; ++m) {
                    I32 sums[QUAD];
                    for (int r = 0; r < QUAD; ++r) sums[r] = start(m);
                    add_block(sums, codes, m, step);
                    finish(sums, m);
                }
            }
        }
        return sums_of_parts(totals);
    }
}

// Four rows of w times all `rows` of x: results[pass] = [row of x][row of w]; passes take about the same rows of x.
template <class Dot, Groups GROUPS, bool ZEROS>
void multiply_quads(const QuadW& w, const QuadX& x, int64_t rows, int64_t row_bytes, float* results) {
    const int64_t passes = div_up(rows, QUAD_X_ROWS);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes;
        const QuadAhead ahead(pass, passes, row_bytes);
        const QuadX at{x.codes + first * x.codes_ld, x.starts + first * x.ld, x.scales + first * x.ld, x.codes_ld, x.ld};
        F32 result;
        switch (rows * (pass + 1) / passes - first) {
            case 1:
                result = multiply_quad<Dot, GROUPS, ZEROS, 1>(w, at, ahead);
                break;
            case 2:
                result = multiply_quad<Dot, GROUPS, ZEROS, 2>(w, at, ahead);
                break;
            case 3:
                result = multiply_quad<Dot, GROUPS, ZEROS, 3>(w, at, ahead);
                break;
            default:
                result = multiply_quad<Dot, GROUPS, ZEROS, 4>(w, at, ahead);
        }
        store(results + pass * F32::WIDTH, result);
    }
}

// Row i of quantized x as the blocks want it.
template <class Dot, Groups GROUPS>
void arrange_quad(const QuadX& x, int64_t i, const int8_t* codes, const float* scales, int64_t blocks,
                  int64_t step_blocks, int64_t x_group, int64_t x_groups, bool zeros) {
    constexpr int W = F32::WIDTH;
    int8_t* to = x.codes + i * x.codes_ld;
    int32_t* starts = x.starts + i * x.ld;
    float* to_scales = x.scales + i * x.ld;
    const I32 times = set1_i32(zeros || GROUPS == Groups::WHOLE ? 1 : -Dot::OFFSET);
    for (int64_t b = 0, step = 0; b < blocks; ++step) {
        const int64_t first = b * Dot::COLUMNS, end = blocks - b < step_blocks ? blocks : b + step_blocks;
        I32 sums = set1_i32(0);
        for (; b < end; ++b) {
            Dot::arrange(codes + b * Dot::COLUMNS, to + b * Dot::COLUMNS);
            sums = sums + Dot::sums(to + b * Dot::COLUMNS);
        }
        if constexpr (in_parts(GROUPS)) {
            store_i32(starts + step * W, zeros ? sums_of_rows({sums, sums, sums, sums}) : sums * times);
            for (int lane = 0; lane < W; ++lane) {
                const int64_t group = (first + lane / QUAD * (Dot::COLUMNS / 4)) / x_group;
                to_scales[step * W + lane] = group < x_groups ? scales[group] : 0;
            }
        } else if constexpr (GROUPS == Groups::WHOLE) {
            for (int r = 0; r < QUAD; ++r) starts[r] = hsum(sums), to_scales[r] = scales[0];
        } else {
            starts[step] = hsum(sums * times);
            to_scales[step] = scales[first / x_group];
        }
    }
}

// The scales and offsets of the quads that are taken together.
struct QuadScales {
    float* rows;       // [QUAD][QUADS_TAKEN * groups], as stored
    float* scales;     // [QUADS_TAKEN][groups][QUAD]
    int32_t* offsets;  // likewise
    int64_t groups;    // of a row, those of whole steps
    int64_t room;      // of a row of `rows`

    static int64_t bytes(int64_t groups) { return 3 * Carver::bytes<float>(room_for(groups) * QUAD); }

    QuadScales(Carver& carve, int64_t row_groups)
        : rows(carve.take<float>(room_for(row_groups) * QUAD)),
          scales(carve.take<float>(room_for(row_groups) * QUAD)),
          offsets(carve.take<int32_t>(room_for(row_groups) * QUAD)),
          groups(row_groups),
          room(room_for(row_groups)) {}

    // `taken` rows of w from each of `first`.
    template <int OFFSET>
    void take(const GroupArgs& g, const int64_t (&first)[QUAD], int64_t taken, bool with_offsets) {
        const int64_t of_row = div_up(g.k, g.group_size);
        if (with_offsets) {
            int32_t* at = reinterpret_cast<int32_t*>(rows);
            for (int r = 0; r < QUAD; ++r)
                for (int64_t i = 0; i < taken; ++i)
                    for (int64_t j = 0; j < groups; ++j)
                        at[r * room + i * groups + j] =
                            -OFFSET - (g.zeros && j < of_row ? g.zeros[(first[r] + i) * of_row + j] : 0);
            interleave_rows(at, room, taken * groups, offsets);
        }
        for (int r = 0; r < QUAD; ++r) {
            float* to = rows + r * room;
            if (groups == of_row) {
                convert_row(to, g.scales, g.scales_dtype, first[r] * groups, taken * groups);
                continue;
            }
            for (int64_t i = 0; i < taken; ++i) {
                convert_row(to + i * groups, g.scales, g.scales_dtype, (first[r] + i) * of_row, of_row);
                for (int64_t j = of_row; j < groups; ++j) to[i * groups + j] = 0;
            }
        }
        interleave_rows(reinterpret_cast<const int32_t*>(rows), room, taken * groups, reinterpret_cast<int32_t*>(scales));
    }

  private:
    static int64_t room_for(int64_t groups) { return round_up(QUADS_TAKEN * groups, F32::WIDTH); }
};

// y of the quads that were taken together, whose rows of w begin at `first`; the first `count` of those are stored.
LLMKERN_INLINE void store_quads(const LinearArgs& a, const float* results, const int64_t (&first)[QUAD], int count,
                                int64_t taken) {
    const int64_t passes = div_up(a.m, QUAD_X_ROWS);
    for (int64_t pass = 0; pass < passes; ++pass) {
        F32 columns[F32::WIDTH];
        for (int64_t i = 0; i < F32::WIDTH; ++i) columns[i] = load(results + (i * passes + pass) * F32::WIDTH);
        turn(columns);
        const int64_t m0 = a.m * pass / passes, rows = a.m * (pass + 1) / passes - m0;
        for (int r = 0; r < count; ++r) {
            const int lanes = static_cast<int>(taken);
            const F32 bias = a.bias ? load_as(a.bias, a.bias_dtype, first[r], lanes) : zero();
            for (int64_t m = 0; m < rows; ++m)
                store_as(a.y, a.x_dtype, (m0 + m) * a.n + first[r], columns[m * QUAD + r] + bias, lanes);
        }
    }
}

template <Groups GROUPS, bool ZEROS, class Rows>
void run_quads(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Dot = typename Rows::Dot;
    constexpr int W = F32::WIDTH;
    QuadW shape;
    shape.blocks = div_up(a.k, Dot::COLUMNS);
    shape.step_blocks = GROUPS == Groups::WHOLE ? shape.blocks : GROUPS == Groups::RUN ? g.group_size / Dot::COLUMNS : 1;
    shape.steps = div_up(shape.blocks, shape.step_blocks);
    shape.last = first_bytes(weight.row_bytes() - (shape.blocks - 1) * Dot::BYTES);
    const int64_t groups = shape.steps * (GROUPS == Groups::QUARTER ? 4 : GROUPS == Groups::HALF ? 2 : 1);
    QuadX x;
    x.codes_ld = shape.blocks * Dot::COLUMNS;
    x.ld = GROUPS == Groups::WHOLE ? QUAD : in_parts(GROUPS) ? shape.steps * W : shape.steps;
    Carver carve(scratch(Scratch::CALL, Carver::bytes<int8_t>(a.m * x.codes_ld) +
                                            2 * Carver::bytes<float>(a.m * x.ld + W)));
    x.codes = carve.take<int8_t>(a.m * x.codes_ld);
    x.starts = carve.take<int32_t>(a.m * x.ld + W);
    x.scales = carve.take<float>(a.m * x.ld + W);
    quantize_rows(a, x_group, 0, a.m, threads, [&](int64_t i, const int8_t* codes, const float* scales) {
        arrange_quad<Dot, GROUPS>(x, i, codes, scales, shape.blocks, shape.step_blocks, x_group, div_up(a.k, x_group),
                                  ZEROS);
    });

    parallel_for(div_up(a.n, QUAD), threads, [&](int64_t begin, int64_t end) {
        const int64_t results_ld = div_up(a.m, QUAD_X_ROWS) * W, row_bytes = weight.row_bytes();
        Carver task(scratch(Scratch::TASK,
                            QuadScales::bytes(groups) + Carver::bytes<float>(QUADS_TAKEN * results_ld)));
        QuadScales scales(task, groups);
        float* results = task.take<float>(QUADS_TAKEN * results_ld);
        const auto multiply = [&](const int64_t (&first)[QUAD], int count, int64_t taken) {
            scales.take<Dot::OFFSET>(g, first, taken, ZEROS || GROUPS == Groups::WHOLE);
            QuadW w = shape;
            for (int64_t i = 0; i < taken; ++i) {
                for (int r = 0; r < QUAD; ++r) w.rows[r] = weight.row(first[r] + i);
                w.scales = scales.scales + i * groups * QUAD;
                w.offsets = scales.offsets + i * groups * QUAD;
                multiply_quads<Dot, GROUPS, ZEROS>(w, x, a.m, row_bytes, results + i * results_ld);
            }
            store_quads(a, results, first, count, taken);
        };
        const int64_t row = begin * QUAD, rows = (end * QUAD < a.n ? end * QUAD : a.n) - row, part = rows / QUAD;
        for (int64_t i = 0; i < part; i += QUADS_TAKEN)
            multiply({row + i, row + part + i, row + 2 * part + i, row + 3 * part + i}, QUAD,
                     part - i < QUADS_TAKEN ? part - i : QUADS_TAKEN);
        // Up to three rows are left: the last one again fills the quad.
        if (const int left = static_cast<int>(rows % QUAD)) {
            const int64_t last = row + rows - 1, n = row + rows - left;
            multiply({n, n + 1 < last ? n + 1 : last, last, last}, left, 1);
        }
    });
}

// False if the groups are not of whole parts.
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
    else
        return false;
    return true;
}
