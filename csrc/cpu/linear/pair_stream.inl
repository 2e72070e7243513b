// Few rows of bf16 x: the codes of a row of w become pairs of bf16 in the registers they were loaded to, and are
// multiplied at once with all rows of a panel of x, whose columns were put in the same order before.
//
//        k ->                               k ->
//   w  [ step | step | ...            x  [ m0: step | step | ... ]    R rows of w by M rows of x: R * M sums
//   ..                                   [ m1: step | step | ... ]    in registers
//   w  [ step | step | ...   (R rows, far from each other: the processor sees R long streams)
//
// The scale multiplies the fp32 sums of a strip: a group, or a part of one, because the rounding error of a chain of
// additions grows with its length. Zero points: a strip's sums start at -zero * (the sums of x in each lane).
//
// Besides what pair_tile.inl asks for, a weight's Pairs give
//
//   static constexpr bool ZERO_POINTS;                  // whether it may have them
//   static constexpr int64_t STREAM_ROWS;               // up to so many rows of x this is faster than tiles
//   __m512i stream(Cursor&) const;                     // as step(), for rows that are read to their end at once
//   __m512i pairs(__m512i dwords, int part) const;     // one of the PARTS vectors of pairs of a step,
//   static constexpr int column(int part, int word);   // and the column, within the step, of one of its 32 words:
//                                                      // lane l of every part holds some of the columns
//                                                      // [l, l + 1) * COLUMNS / 16
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// Rows of x that are multiplied together, and rows of w with them: 12 sums at most, as many totals, R steps as loaded,
// the tables and shifts of a format.
constexpr int PAIR_PANEL = 4;
constexpr int pair_rows_of(int m) { return m <= 3 ? 4 : 3; }
// Columns of a strip where a group is longer.
constexpr int64_t PAIR_STRIP = 512;
// Rows of w whose scales are converted at once.
constexpr int64_t PAIR_SCALES = 16;

// Where the strips of a row are.
struct PairStrips {
    int64_t steps;        // of a row, the last one short if `left` columns are left
    int64_t left;         // columns of the short step, or 0
    int64_t strip;        // steps of a strip
    int64_t per_group;    // strips of a group
    int64_t groups;       // of a row
    int64_t step_groups;  // groups of a step where groups are steps or parts of them, else 0
};

// False if the groups do not fit.
template <class Pairs>
bool fit_strips(const GroupArgs& g, PairStrips& to) {
    constexpr int64_t COLUMNS = Pairs::COLUMNS, LANE = COLUMNS / LANES;
    to = {div_up(g.k, COLUMNS), g.k % COLUMNS, PAIR_STRIP / COLUMNS, INT64_MAX, div_up(g.k, g.group_size), 0};
    if (g.group_size >= g.k) return true;
    if (g.group_size % PAIR_STRIP == 0) {
        to.per_group = g.group_size / PAIR_STRIP;
    } else if (COLUMNS % g.group_size == 0 && g.group_size % LANE == 0) {
        to.step_groups = COLUMNS / g.group_size;
    } else if (g.group_size % COLUMNS == 0 && g.group_size < 2 * PAIR_STRIP) {
        to.strip = g.group_size / COLUMNS;
        to.per_group = 1;
    } else {
        return false;
    }
    return true;
}

// x of one call, its rows in panels; what is read together stands together.
struct PairX {
    uint16_t* words;  // [panel][step][part][row of the panel][32]
    float* sums;      // [panel][step][row of the panel][16]: of the columns of each lane; null without zero points
    int64_t steps, rows, panels;

    int64_t panel_row(int64_t panel) const { return rows * panel / panels; }
};

template <class Pairs>
struct PairOrder {
    static constexpr int SOURCES = Pairs::COLUMNS / 32;
    alignas(64) uint16_t index[Pairs::PARTS][32] = {};  // within two registers of x
    uint32_t upper[Pairs::PARTS] = {};                  // bit w: word w comes from the second two
    constexpr PairOrder() {
        for (int part = 0; part < Pairs::PARTS; ++part)
            for (int word = 0; word < 32; ++word) {
                const int column = Pairs::column(part, word);
                index[part][word] = static_cast<uint16_t>(column % 64);
                upper[part] |= static_cast<uint32_t>(column / 64) << word;
            }
    }
};

// Row m of x, row i of the `rows` of its panel.
template <class Pairs>
void arrange_pairs(const LinearArgs& a, int64_t m, int64_t i, int64_t rows, const PairX& to) {
    static constexpr PairOrder<Pairs> ORDER;
    constexpr int PARTS = Pairs::PARTS, SOURCES = ORDER.SOURCES;
    const auto* x = static_cast<const uint16_t*>(a.x) + m * a.k;
    uint16_t* words = to.words + (m - i) * to.steps * PARTS * 32;
    float* sums = to.sums ? to.sums + (m - i) * to.steps * LANES : nullptr;
    for (int64_t step = 0; step < to.steps; ++step) {
        __m512i from[4];
        for (int s = 0; s < SOURCES; ++s) {
            const int64_t k = step * Pairs::COLUMNS + s * 32;
            from[s] = k < a.k ? _mm512_maskz_loadu_epi16(words_mask(a.k - k), x + k) : _mm512_setzero_si512();
        }
        __m512 sum = _mm512_setzero_ps();
        for (int part = 0; part < PARTS; ++part) {
            const __m512i index = _mm512_load_si512(ORDER.index[part]);
            __m512i v = _mm512_permutex2var_epi16(from[0], index, from[SOURCES > 1 ? 1 : 0]);
            if constexpr (SOURCES > 2)
                v = _mm512_mask_blend_epi16(ORDER.upper[part], v, _mm512_permutex2var_epi16(from[2], index, from[3]));
            _mm512_storeu_si512(words + ((step * PARTS + part) * rows + i) * 32, v);
            if (sums) {
                const __m512i high = _mm512_and_si512(v, _mm512_set1_epi32(-65536));
                sum = _mm512_add_ps(
                    sum, _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(high)));
            }
        }
        if (sums) _mm512_storeu_ps(sums + (step * rows + i) * LANES, sum);
    }
}

// Sums over the lanes of four vectors. Each has the same order of additions wherever it stands.
LLMKERN_INLINE __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const auto half = [](__m512 v) __attribute__((always_inline)) {
        const __m256 sum = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    };
    __m128 v[4] = {half(a), half(b), half(c), half(d)};
    _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
    return _mm_add_ps(_mm_add_ps(v[0], v[1]), _mm_add_ps(v[2], v[3]));
}

// out[i] = the sum of the lanes of v[i].
template <int N>
LLMKERN_INLINE void sum_lanes(const __m512 (&v)[N], float* out) {
    const auto at = [&](int i) __attribute__((always_inline)) { return i < N ? v[i] : _mm512_setzero_ps(); };
    float sums[(N + 3) / 4 * 4];
    for (int i = 0; i < N; i += 4) _mm_storeu_ps(sums + i, sums_of_four(at(i), at(i + 1), at(i + 2), at(i + 3)));
    for (int i = 0; i < N; ++i) out[i] = sums[i];
}

// What the rows of one call share.
template <class Pairs>
struct PairCall {
    const LinearArgs& a;
    const GroupArgs& g;
    const Pairs& weight;
    PairStrips strips;
    PairX x;
};

// The scales of R rows and their zero points, negative: row r's are r * ld after the first's.
struct PairScales {
    const float *scales, *zeros;
    int64_t ld;
};

// The strips of one row of w.
enum class Strip {
    STEPS,  // several steps, one scale
    STEP,   // one step, one scale
    SPLIT,  // one step with several scales
};

// R rows of w, n, n + n_step, ..., times M rows of x, the panel that starts with row m0.
template <class Pairs, Strip STRIP, bool ZEROS, int R, int M>
void stream_pairs(const PairCall<Pairs>& call, int64_t n, int64_t n_step, int64_t m0, PairScales s) {
    // Not by R: a row's sums must not depend on which rows it is multiplied with, that is, on the number of threads.
    constexpr int PARTS = Pairs::PARTS, CHAINS = M == 1 && PARTS > 1 ? 2 : 1;
    const LinearArgs& a = call.a;
    const PairStrips& strips = call.strips;
    const Pairs& weight = call.weight;
    typename Pairs::Cursor at[R];
    for (int r = 0; r < R; ++r) weight.start(at[r], n + r * n_step);
    const uint16_t* x = call.x.words + m0 * strips.steps * PARTS * 32;
    const float* x_sums = ZEROS ? call.x.sums + m0 * strips.steps * LANES : nullptr;
    __m512i lane_groups = _mm512_setzero_si512();
    __mmask16 lanes = 0xffff;  // that hold columns
    if constexpr (STRIP == Strip::SPLIT) {
        alignas(64) int32_t groups[LANES];
        for (int i = 0; i < LANES; ++i) groups[i] = static_cast<int32_t>(i * strips.step_groups / LANES);
        lane_groups = _mm512_load_si512(groups);
    }
    const auto of_lanes = [&](const float* values) __attribute__((always_inline)) {
        return STRIP == Strip::SPLIT
                   ? select(Mask{lanes}, {_mm512_permutexvar_ps(lane_groups, _mm512_loadu_ps(values))}, zero()).v
                   : _mm512_set1_ps(*values);
    };

    __m512 totals[R * M], sums[R * M][CHAINS];
    unrolled<R * M>([&](auto i) __attribute__((always_inline)) { totals[i] = _mm512_setzero_ps(); });
    const auto begin = [&]() __attribute__((always_inline)) {
        unrolled<R * M>([&](auto i) __attribute__((always_inline)) {
            for (int c = 0; c < CHAINS; ++c) sums[i][c] = _mm512_setzero_ps();
        });
    };
    const auto add_step = [&](const __m512i(&raw)[R]) __attribute__((always_inline)) {
        if constexpr (ZEROS) {
            unrolled<R>([&](auto r) __attribute__((always_inline)) {
                const __m512 zero = of_lanes(s.zeros + r * s.ld);
                unrolled<M>([&](auto m) __attribute__((always_inline)) {
                    sums[r * M + m][0] = _mm512_fmadd_ps(zero, _mm512_loadu_ps(x_sums + m * LANES), sums[r * M + m][0]);
                });
            });
            x_sums += M * LANES;
        }
        unrolled<PARTS>([&](auto part) __attribute__((always_inline)) {
            __m512i w[R];
            unrolled<R>([&](auto r) __attribute__((always_inline)) { w[r] = weight.pairs(raw[r], part); });
            unrolled<M>([&](auto m) __attribute__((always_inline)) {
                const __m512i xs = _mm512_loadu_si512(x + (part * M + m) * 32);
                unrolled<R>([&](auto r) __attribute__((always_inline)) {
                    sums[r * M + m][part % CHAINS] = add_pairs(sums[r * M + m][part % CHAINS], w[r], xs);
                });
            });
        });
        x += PARTS * M * 32;
    };
    const auto add_next = [&]() __attribute__((always_inline)) {
        __m512i raw[R];
        unrolled<R>([&](auto r) __attribute__((always_inline)) { raw[r] = weight.stream(at[r]); });
        add_step(raw);
    };
    const auto add_last = [&]() __attribute__((always_inline)) {
        __m512i raw[R];
        for (int r = 0; r < R; ++r) raw[r] = weight.last(at[r], static_cast<int>(strips.left));
        add_step(raw);
    };
    const auto scale = [&]() __attribute__((always_inline)) {
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
            const __m512 by = of_lanes(s.scales + r * s.ld);
            unrolled<M>([&](auto m) __attribute__((always_inline)) {
                constexpr int i = r * M + m;
                if constexpr (CHAINS == 2) sums[i][0] = _mm512_add_ps(sums[i][0], sums[i][1]);
                totals[i] = _mm512_fmadd_ps(sums[i][0], by, totals[i]);
            });
        });
    };

    const int64_t whole = strips.steps - (strips.left > 0);
    if constexpr (STRIP == Strip::STEPS) {
        int64_t left_of_group = strips.per_group;
        for (int64_t step = 0; step < strips.steps;) {
            const int64_t end = strips.steps - step < strips.strip ? strips.steps : step + strips.strip;
            begin();
            for (const int64_t stop = end < whole ? end : whole; step < stop; ++step) add_next();
            if (step < end) ++step, add_last();
            scale();
            if (--left_of_group == 0) left_of_group = strips.per_group, ++s.scales, ++s.zeros;
        }
    } else {
        for (int64_t step = 0; step < whole; ++step) {
            begin();
            add_next();
            scale();
            s.scales += strips.step_groups, s.zeros += strips.step_groups;
        }
        // What stands behind a row's last scale is another row's, and may be NaN.
        lanes = lanes_mask(div_up(strips.left, Pairs::COLUMNS / LANES));
        if (strips.left > 0) begin(), add_last(), scale();
    }

    float out[R * M];
    sum_lanes(totals, out);
    auto* y = static_cast<uint16_t*>(a.y) + m0 * a.n + n;
    for (int r = 0; r < R; ++r) {
        const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n + r * n_step) : 0.0f;
        for (int m = 0; m < M; ++m) y[m * a.n + r * n_step] = to_bf16(out[r * M + m] + bias);
    }
}

// A panel of M rows of x, or M - 1.
template <class Pairs, Strip STRIP, bool ZEROS, int R, int M>
void stream_panel(int64_t rows, const PairCall<Pairs>& call, int64_t n, int64_t n_step, int64_t m0, PairScales s) {
    if constexpr (M > 1)
        if (rows < M) return stream_pairs<Pairs, STRIP, ZEROS, R, M - 1>(call, n, n_step, m0, s);
    stream_pairs<Pairs, STRIP, ZEROS, R, M>(call, n, n_step, m0, s);
}

// All rows of w times all of x, R by M at a time.
template <class Pairs, Strip STRIP, bool ZEROS, int R, int M>
void stream_all(const PairCall<Pairs>& call) {
    const LinearArgs& a = call.a;
    const GroupArgs& g = call.g;
    const int64_t groups = call.strips.groups;
    parallel_for(a.n, worth_threads(a), [&](int64_t begin, int64_t end) {
        // SPLIT reads a vector at any group.
        const int64_t ld = PAIR_SCALES * groups + LANES;
        Carver carve(scratch(Scratch::TASK, 2 * R * Carver::bytes<float>(ld)));
        float *scales = carve.take<float>(R * ld), *zeros = carve.take<float>(R * ld);
        const auto take = [&](int64_t n, int64_t n_step, int64_t taken, int count) {
            for (int r = 0; r < count; ++r) {
                const int64_t first = (n + r * n_step) * groups, values = taken * groups;
                float *scale = scales + r * ld, *zero = zeros + r * ld;
                if (g.scales)
                    convert_row(scale, g.scales, g.scales_dtype, first, values);
                else
                    for (int64_t j = 0; j < values; ++j) scale[j] = 1;
                if (ZEROS)
                    for (int64_t j = 0; j < values; ++j) zero[j] = static_cast<float>(-g.zeros[first + j]);
            }
        };
        // Panel by panel, so that one of x stays in the inner cache while `taken` times R rows of w wait in the outer
        // one.
        const auto rows = [&](auto r, int64_t n, int64_t n_step, int64_t taken) {
            take(n, n_step, taken, r);
            for (int64_t panel = 0; panel < call.x.panels; ++panel) {
                const int64_t m0 = call.x.panel_row(panel), count = call.x.panel_row(panel + 1) - m0;
                for (int64_t i = 0; i < taken; ++i) {
                    const PairScales s{scales + i * groups, zeros + i * groups, ld};
                    stream_panel<Pairs, STRIP, ZEROS, r, M>(count, call, n + i, n_step, m0, s);
                }
            }
        };
        const int64_t part = (end - begin) / R, rest = begin + R * part;
        for (int64_t n = begin; n < begin + part; n += PAIR_SCALES)
            rows(std::integral_constant<int, R>(), n, part,
                 begin + part - n < PAIR_SCALES ? begin + part - n : PAIR_SCALES);
        rows(std::integral_constant<int, 1>(), rest, 0, end - rest);
    });
}

template <class Pairs, Strip STRIP, bool ZEROS>
void stream_rows_of_x(const PairCall<Pairs>& call) {
    switch (div_up(call.x.rows, call.x.panels)) {
        case 1:
            return stream_all<Pairs, STRIP, ZEROS, pair_rows_of(1), 1>(call);
        case 2:
            return stream_all<Pairs, STRIP, ZEROS, pair_rows_of(2), 2>(call);
        case 3:
            return stream_all<Pairs, STRIP, ZEROS, pair_rows_of(3), 3>(call);
        default:
            return stream_all<Pairs, STRIP, ZEROS, pair_rows_of(4), 4>(call);
    }
}

template <class Pairs, bool ZEROS>
void stream_strips(const PairCall<Pairs>& call) {
    if (call.strips.step_groups > 1) return stream_rows_of_x<Pairs, Strip::SPLIT, ZEROS>(call);
    if (call.strips.step_groups == 1) return stream_rows_of_x<Pairs, Strip::STEP, ZEROS>(call);
    stream_rows_of_x<Pairs, Strip::STEPS, ZEROS>(call);
}

// False if these arguments must go another way.
template <class Pairs>
bool run_pair_stream(const LinearArgs& a, const GroupArgs& g, const Pairs& weight) {
    if (a.x_dtype != DType::BF16 || a.m > Pairs::STREAM_ROWS || a.k == 0 || !fast_bf16_products()) return false;
    PairStrips strips;
    if (!fit_strips<Pairs>(g, strips)) return false;
    const int64_t steps = strips.steps, words = a.m * steps * Pairs::PARTS * 32, sums = a.m * steps * LANES;
    Carver carve(scratch(Scratch::CALL, Carver::bytes<uint16_t>(words) + Carver::bytes<float>(g.zeros ? sums : 0)));
    PairX x{carve.take<uint16_t>(words), nullptr, steps, a.m, div_up(a.m, PAIR_PANEL)};
    if (g.zeros) x.sums = carve.take<float>(sums);
    for (int64_t panel = 0; panel < x.panels; ++panel) {
        const int64_t m0 = x.panel_row(panel), rows = x.panel_row(panel + 1) - m0;
        for (int64_t i = 0; i < rows; ++i) arrange_pairs<Pairs>(a, m0 + i, i, rows, x);
    }
    const PairCall<Pairs> call{a, g, weight, strips, x};
    if constexpr (Pairs::ZERO_POINTS)
        if (g.zeros) return stream_strips<Pairs, true>(call), true;
    stream_strips<Pairs, false>(call);
    return true;
}
