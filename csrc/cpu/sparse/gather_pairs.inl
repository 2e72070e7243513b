// Few rows of bf16 x times kept pairs: not the weight is put in place, x is. For 64 columns of a row of w
//
//   positions  8 bytes --> 32 fields of two bits in words, + 4 * quad = index of a column        2 instructions
//   x          64 columns of a row of x in two registers, looked up by the index = 32 words      1 per row of x
//   values     32 words in order                                                                 bf16: 0, int4: 3
//
// and one multiplication per row of x. Included inside namespace llmkern::LLMKERN_NS.

// Rows of x that are multiplied together, and with how many rows of w: sums, totals, w and indices, and two registers
// of x. Of several panels each reads w again, but from a cache.
constexpr int GATHER_PANEL = 4;
constexpr int gather_together(int64_t m) { return m <= 2 ? 4 : m <= GATHER_PANEL ? 2 : 3; }
// How far ahead of its reading a stream of values is asked for, in bytes.
constexpr int64_t GATHER_AHEAD = 1024;
// Sums start again from 0 after at most so many steps: the rounding error of a chain grows with its length.
constexpr int64_t GATHER_STEPS = 64;

// Word i: where its field begins, and the first column of its quad.
alignas(64) inline constexpr uint16_t GATHER_FIELDS[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                           22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                           44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
alignas(64) inline constexpr uint16_t GATHER_QUADS[32] = {0,  0,  4,  4,  8,  8,  12, 12, 16, 16, 20,
                                                          20, 24, 24, 28, 28, 32, 32, 36, 36, 40, 40,
                                                          44, 44, 48, 48, 52, 52, 56, 56, 60, 60};

LLMKERN_INLINE __m512i gather_index(const uint8_t* positions) {
    const __m512i fields = _mm512_set1_epi64(static_cast<int64_t>(load_word(positions)));
    const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(GATHER_FIELDS), fields);
    const __m512i field = _mm512_set1_epi32(0x00030003), quads = _mm512_load_si512(GATHER_QUADS);
    return _mm512_ternarylogic_epi32(shifted, field, quads, 0xea);  // shifted & field | quads
}

// What the rows of one call share.
template <Kept KEPT>
struct GatherCall {
    const LinearArgs& a;
    const GroupArgs& g;
    const TwoOfFourPairs<KEPT>& w;
    const uint16_t* x;  // [panel][step][row of x][64], padded with zeros
    int64_t panels;
    int64_t ld;  // of a row of x
    int64_t groups;
    int64_t group_steps;  // steps that share a scale, or with one group that are added in a chain

    int64_t panel_row(int64_t panel) const { return a.m * panel / panels; }
};

// sums[r][m] += the products of one step.
template <Kept KEPT, int R, int M>
LLMKERN_INLINE void gather_step(const uint8_t* values, int64_t values_ld, const uint8_t* positions,
                                int64_t positions_ld, const uint16_t* x, __m512 (&sums)[R][M]) {
    __m512i index[R], w[R];
    for (int r = 0; r < R; ++r) {
        index[r] = gather_index(positions + r * positions_ld);
        w[r] = kept_words<KEPT>(values + r * values_ld);
    }
    for (int m = 0; m < M; ++m) {  // x in registers: all R rows take it from there
        const __m512i low = in_register(_mm512_load_si512(x + m * STEP_COLUMNS));
        const __m512i high = in_register(_mm512_load_si512(x + m * STEP_COLUMNS + 32));
        for (int r = 0; r < R; ++r)
            sums[r][m] = add_pairs(sums[r][m], w[r], _mm512_permutex2var_epi16(low, index[r], high));
    }
}

// Scales of rows n, n + n_step, ... of w: of row r from scales + r * ld, a group after the other.
struct RowScales {
    const float* scales;  // null: all are 1
    int64_t ld;
};

template <int R>
RowScales take_scales(const GroupArgs& g, int64_t groups, int64_t n, int64_t n_step, float* memory) {
    if (!g.scales) return {nullptr, 0};
    if (g.scales_dtype == DType::F32) return {static_cast<const float*>(g.scales) + n * groups, n_step * groups};
    for (int r = 0; r < R; ++r)
        convert_row(memory + r * groups, g.scales, g.scales_dtype, (n + r * n_step) * groups, groups);
    return {memory, groups};
}

// Rows n, n + n_step, ... of w times the M rows of x from m0 on, which are a panel.
template <Kept KEPT, int R, int M>
void gather_panel(const GatherCall<KEPT>& call, int64_t n, int64_t n_step, int64_t m0, const RowScales& scales) {
    const LinearArgs& a = call.a;
    const int64_t row_positions = (a.k + 7) / 8;
    const int64_t values_ld = n_step * call.w.row_bytes, positions_ld = n_step * row_positions;
    const uint8_t* values = call.w.values + n * call.w.row_bytes;
    const uint8_t* positions = call.w.positions + n * row_positions;
    const uint16_t* x = call.x + m0 * call.ld;
    const float* scale = scales.scales;
    const int64_t whole = a.k / STEP_COLUMNS;
    const int rest = static_cast<int>(a.k % STEP_COLUMNS);
    __m512 totals[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) totals[r][m] = _mm512_setzero_ps();
    for (int64_t step = 0; step < whole || (step == whole && rest);) {
        __m512 sums[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
        const int64_t end = step + call.group_steps;
        const auto next = [&]() __attribute__((always_inline)) {
            gather_step<KEPT, R, M>(values, values_ld, positions, positions_ld, x, sums);
            values += STEP_VALUES<KEPT>;
            positions += STEP_POSITIONS;
            x += M * STEP_COLUMNS;
            ++step;
        };
        for (const int64_t stop = end < whole ? end : whole; step < stop;) {
            for (int r = 0; r < R; ++r)
                for (int line = 0; line < 2 * STEP_VALUES<KEPT>; line += 64)
                    prefetch(values + r * values_ld + GATHER_AHEAD + line);
            for (int r = 0; r < R; ++r)
                prefetch(positions + r * positions_ld + GATHER_AHEAD * STEP_POSITIONS / STEP_VALUES<KEPT>);
            next();
            if (step < stop) next();
        }
        if (step < end && rest) {
            ++step;
            LastStep<KEPT> last[R];
            for (int r = 0; r < R; ++r) last[r].take(values + r * values_ld, positions + r * positions_ld, rest);
            gather_step<KEPT, R, M>(last[0].values, sizeof last[0], last[0].positions, sizeof last[0], x, sums);
        }
        for (int r = 0; r < R; ++r) {
            const __m512 by = _mm512_set1_ps(scale ? scale[r * scales.ld] : 1.0f);
            for (int m = 0; m < M; ++m) totals[r][m] = _mm512_fmadd_ps(sums[r][m], by, totals[r][m]);
        }
        if (scale) ++scale;
    }

    constexpr int COUNT = R * M;
    alignas(16) float out[COUNT + 3];
    for (int i = 0; i < COUNT; i += 4) {
        const auto total = [&](int j) __attribute__((always_inline)) {
            return j < COUNT ? totals[j / M][j % M] : _mm512_setzero_ps();
        };
        _mm_store_ps(out + i, sums_of_four(total(i), total(i + 1), total(i + 2), total(i + 3)));
    }
    for (int r = 0; r < R; ++r) {
        const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n + r * n_step) : 0.0f;
        for (int m = 0; m < M; ++m) store_one(a.y, DType::BF16, (m0 + m) * a.n + n + r * n_step, out[r * M + m] + bias);
    }
}

// A panel of `rows`, up to M.
template <Kept KEPT, int R, int M = GATHER_PANEL>
void gather_panel_of(int64_t rows, const GatherCall<KEPT>& call, int64_t n, int64_t n_step, int64_t m0,
                     const RowScales& scales) {
    if constexpr (M > 1)
        if (rows < M) return gather_panel_of<KEPT, R, M - 1>(rows, call, n, n_step, m0, scales);
    gather_panel<KEPT, R, M>(call, n, n_step, m0, scales);
}

// R rows of w, far from each other so that the processor sees R long streams, times all rows of x.
template <Kept KEPT, int R>
void gather_rows(const GatherCall<KEPT>& call, int64_t n, int64_t n_step, float* memory) {
    const RowScales scales = take_scales<R>(call.g, call.groups, n, n_step, memory);
    for (int64_t panel = 0; panel < call.panels; ++panel) {
        const int64_t m0 = call.panel_row(panel);
        gather_panel_of<KEPT, R>(call.panel_row(panel + 1) - m0, call, n, n_step, m0, scales);
    }
}

template <Kept KEPT, int R>
void run_gather_rows(const GatherCall<KEPT>& call) {
    parallel_for(call.a.n, worth_threads(call.a), [&](int64_t begin, int64_t end) {
        float* memory = scratch_floats(Scratch::TASK, static_cast<size_t>(R * call.groups));
        const int64_t part = (end - begin) / R;
        for (int64_t n = begin; n < begin + part; ++n) gather_rows<KEPT, R>(call, n, part, memory);
        for (int64_t n = begin + R * part; n < end; ++n) gather_rows<KEPT, 1>(call, n, 0, memory);
    });
}

// y = x @ wᵀ + bias for few rows of bf16 x. Groups are whole steps.
template <Kept KEPT>
void run_gather_pairs(const LinearArgs& a, const GroupArgs& g, const TwoOfFourPairs<KEPT>& w) {
    const int64_t ld = round_up(a.k, STEP_COLUMNS), groups = div_up(a.k, g.group_size);
    auto* x = static_cast<uint16_t*>(scratch(Scratch::CALL, sizeof(uint16_t) * static_cast<size_t>(a.m * ld)));
    const GatherCall<KEPT> call{
        a, g, w, x, div_up(a.m, GATHER_PANEL), ld, groups, groups > 1 ? g.group_size / STEP_COLUMNS : GATHER_STEPS};
    for (int64_t panel = 0; panel < call.panels; ++panel) {
        const int64_t m0 = call.panel_row(panel), rows = call.panel_row(panel + 1) - m0;
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t k = 0; k < ld; k += 32) {
                const auto* from = static_cast<const uint16_t*>(a.x) + (m0 + m) * a.k + k;
                const int64_t step = k / STEP_COLUMNS * rows + m;
                _mm512_store_si512(x + m0 * ld + step * STEP_COLUMNS + k % STEP_COLUMNS,
                                   _mm512_maskz_loadu_epi16(k < a.k ? words_mask(a.k - k) : 0, from));
            }
    }
    switch (gather_together(a.m)) {
        case 2:
            return run_gather_rows<KEPT, 2>(call);
        case 3:
            return run_gather_rows<KEPT, 3>(call);
        default:
            return run_gather_rows<KEPT, 4>(call);
    }
}
