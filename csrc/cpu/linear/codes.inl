// Few rows of x times rows of integer codes, kept activations, for a level that is short of operations rather than of
// registers: no code is moved within a register, centred or scaled.
//
//   sum over k in a group of (u[k] - o) * s * x[k] = s * (sum of u[k] * x[k] - o * (sum of x[k])),  u = q + OFFSET
//
// The sums of x are known before, lane by lane, so that a group's fp32 sums start at -o times them, and end as the dot
// product of centred codes; then the scale is applied once per group. A level gives Codes per format:
//
//   struct Codes {
//       static constexpr int BYTES, COLUMNS;         // a chunk: bytes of a row, and the columns in them
//       static constexpr int OFFSET;
//       static constexpr int VECTORS;                // COLUMNS / WIDTH
//       static F32 lanes(const float* x, int v);     // the x of a chunk's columns in the order of vector(v)
//       static constexpr float factor(int v);        // vector(v) is u / factor(v); x is multiplied by it beforehand
//       struct Raw;                                  // a chunk of one row
//       static Raw load(const uint8_t*);
//       static F32 vector(const Raw&, int v);
//   };
//
// x that is infinite, NaN, or so small that `factor` would cost it bits goes the general way (stream.inl).
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// How far ahead of its reading a stream of codes is asked for, in bytes.
constexpr int64_t CODES_AHEAD = 1024;
// Sums start again from 0 after at most so many columns: the rounding error of a chain grows with its length.
constexpr int64_t CODES_STRIP = 512;
// Rows of x that are multiplied together: 12 sums, R decoded vectors and one of x fill the registers. x comes from L2
// for every R rows of w.
constexpr int64_t CODES_PANEL = 4;
// Scaling the sums of strips shorter than CODES_SHORT columns costs more than scaling the weights (stream.inl) for more
// rows of x than CODES_PANEL_SHORT.
constexpr int64_t CODES_SHORT = 128, CODES_PANEL_SHORT = 3;
// For more rows of x than this, tiles are faster (multiply.inl).
constexpr int64_t CODES_ROWS = 8;
// The least largest |x| for which 16^-7 of it is far above the smallest floats.
constexpr float CODES_SMALLEST = 1e-28f;

// A row is cut into strips, whose sums are scaled once: `whole` of `chunks` chunks each, one or several to a group,
// then one of the whole chunks that are left, if there are any, then one of the chunk that ends the row, if that is
// short.
struct CodesStrips {
    int64_t whole, chunks, rest, tail;  // rest: chunks; tail: bytes
    int64_t row_chunks;

    int64_t count() const { return whole + (rest > 0) + (tail > 0); }
    int64_t first_chunk(int64_t strip) const {
        const int64_t first = strip * chunks, short_chunk = row_chunks - (tail > 0);
        return strip <= whole && (strip < whole || rest > 0) ? first : short_chunk;
    }
};

// x of one call. What is read together stands together: rows of x as far apart as a power of two would share a few sets
// of the caches.
struct CodesX {
    float* x;             // [panel][vector][row of the panel][WIDTH], permuted and multiplied
    float* sums;          // [panel][strip][row of the panel][WIDTH]
    int32_t* groups;      // [strip]: the group it belongs to
    int64_t ld, sums_ld;  // floats of one row of x
    int64_t rows, panels;

    int64_t panel_row(int64_t panel) const { return rows * panel / panels; }
};

// Columns of a strip, or 0 where groups are no whole chunks.
template <class Codes>
int64_t strip_columns(const GroupArgs& g) {
    if (g.group_size >= g.k) return CODES_STRIP;
    int64_t strip = g.group_size;
    while (strip > CODES_STRIP && strip % 2 == 0) strip /= 2;
    return strip % Codes::COLUMNS == 0 && strip <= 2 * CODES_STRIP ? strip : 0;
}

// Row m of x, row i of `rows` of a panel; false if it must not go this way.
template <class Codes>
bool unfold_codes_x(const LinearArgs& a, int64_t m, int64_t i, int64_t rows, const CodesStrips& strips,
                    const CodesX& to) {
    float *x_to = to.x + (m - i) * to.ld, *sums = to.sums + (m - i) * to.sums_ld;
    constexpr int W = F32::WIDTH, V = Codes::VECTORS;
    F32 largest = zero();
    bool finite = true;
    for (int64_t strip = 0; strip < strips.count(); ++strip) {
        F32 sum = zero();
        const int64_t end = strip + 1 < strips.count() ? strips.first_chunk(strip + 1) : strips.row_chunks;
        for (int64_t chunk = strips.first_chunk(strip); chunk < end; ++chunk) {
            alignas(64) float part[Codes::COLUMNS] = {};
            const int64_t k0 = chunk * Codes::COLUMNS, left = a.k - k0;
            convert_row(part, a.x, a.x_dtype, m * a.k + k0, left < Codes::COLUMNS ? left : Codes::COLUMNS);
            for (int v = 0; v < V; ++v) {
                const F32 x = Codes::lanes(part, v);
                largest = max(abs(x), largest);
                sum = sum + x;
                store(x_to + ((chunk * V + v) * rows + i) * W, x * set1(Codes::factor(v)));
            }
        }
        store(sums + (strip * rows + i) * W, sum);
        finite = finite && hsum(sum * zero()) == 0.0f;
    }
    const float absmax = hmax(largest);
    return finite && (absmax == 0.0f || absmax >= CODES_SMALLEST);
}

// R rows of w, far from each other (the processor then sees R long streams), from some strip on.
struct CodesW {
    const uint8_t* bytes;
    int64_t stride;        // bytes from one row to the next one
    const float* scaling;  // [strip][2][R]: scales, and -(OFFSET + zero point)
};

// totals[r][m] += row r of w times row m of x, over `strips` strips of `chunks` chunks.
template <class Codes, int R, int M>
LLMKERN_INLINE void multiply_codes(CodesW w, const float* x, const float* x_sums, int64_t strips, int64_t chunks,
                                   int64_t ahead, F32 (&totals)[R][M]) {
    // Not by R: a row's sums must not depend on which rows it is multiplied with, that is, on the number of threads.
    constexpr int W = F32::WIDTH, V = Codes::VECTORS, CHAINS = M == 1 ? 2 : 1;
    for (; strips > 0; --strips) {
        F32 sums[R][M][CHAINS];
        for (int r = 0; r < R; ++r) {
            const F32 offset = set1(w.scaling[R + r]);
            for (int m = 0; m < M; ++m) {
                sums[r][m][0] = offset * load(x_sums + m * W);
                for (int c = 1; c < CHAINS; ++c) sums[r][m][c] = zero();
            }
        }
        for (int64_t c = 0; c < chunks; ++c) {
            typename Codes::Raw raw[R];
            for (int r = 0; r < R; ++r) {
                raw[r] = Codes::load(w.bytes + r * w.stride);
                prefetch(w.bytes + r * w.stride + ahead);
            }
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                F32 codes[R];
                for (int r = 0; r < R; ++r) codes[r] = Codes::vector(raw[r], v);
                for (int m = 0; m < M; ++m) {
                    const F32 xs = load(x + (v * M + m) * W);
                    for (int r = 0; r < R; ++r) sums[r][m][v % CHAINS] = fma(codes[r], xs, sums[r][m][v % CHAINS]);
                }
            }
            w.bytes += Codes::BYTES;
            x += V * M * W;
        }
        for (int r = 0; r < R; ++r) {
            const F32 scale = set1(w.scaling[r]);
            for (int m = 0; m < M; ++m) {
                for (int c = 1; c < CHAINS; ++c) sums[r][m][0] = sums[r][m][0] + sums[r][m][c];
                totals[r][m] = fma(scale, sums[r][m][0], totals[r][m]);
            }
        }
        w.scaling += 2 * R;
        x_sums += M * W;
    }
}

// What the rows of one call share.
struct CodesCall {
    const LinearArgs& a;
    const GroupArgs& g;
    const CodesStrips& strips;
    const CodesX& x;
    const uint8_t* codes;
    int64_t row_bytes, groups;
};

// scaling [strip][2][R] of rows n + r * n_step.
template <class Codes, int R>
void take_scaling(const CodesCall& call, int64_t n, int64_t n_step, float* row, float* scaling) {
    const GroupArgs& g = call.g;
    const int64_t strips = call.strips.count();
    const int32_t* groups = call.x.groups;
    for (int r = 0; r < R; ++r) {
        const int64_t at = (n + r * n_step) * call.groups;
        const float* scales = static_cast<const float*>(g.scales) + at;
        if (g.scales_dtype != DType::F32) {
            convert_row(row, g.scales, g.scales_dtype, at, call.groups);
            scales = row;
        }
        for (int64_t strip = 0; strip < strips; ++strip) {
            scaling[strip * 2 * R + r] = scales[groups[strip]];
            scaling[strip * 2 * R + R + r] = -Codes::OFFSET;
        }
        if (g.zeros)
            for (int64_t strip = 0; strip < strips; ++strip)
                scaling[strip * 2 * R + R + r] -= static_cast<float>(g.zeros[at + groups[strip]]);
    }
}

// R rows of w, n, n + n_step, ..., times the M rows of x from m0 on, which are a panel.
template <class Codes, int R, int M>
void codes_panel(const CodesCall& call, int64_t n, int64_t n_step, int64_t m0, const float* scaling) {
    const LinearArgs& a = call.a;
    const CodesStrips& strips = call.strips;
    F32 totals[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) totals[r][m] = zero();
    const auto multiply = [&](const uint8_t* bytes, int64_t stride, int64_t strip, int64_t many, int64_t chunks,
                              int64_t ahead) __attribute__((always_inline)) {
        multiply_codes<Codes, R, M>(CodesW{bytes, stride, scaling + strip * 2 * R},
                                    call.x.x + m0 * call.x.ld + strips.first_chunk(strip) * Codes::COLUMNS * M,
                                    call.x.sums + m0 * call.x.sums_ld + strip * M * F32::WIDTH, many, chunks, ahead,
                                    totals);
    };
    const uint8_t* bytes = call.codes + n * call.row_bytes;
    const int64_t stride = n_step * call.row_bytes, rest = strips.first_chunk(strips.whole);
    multiply(bytes, stride, 0, strips.whole, strips.chunks, CODES_AHEAD);
    if (strips.rest) multiply(bytes + rest * Codes::BYTES, stride, strips.whole, 1, strips.rest, CODES_AHEAD);
    if (strips.tail) {
        uint8_t last[R][Codes::BYTES] = {};
        for (int r = 0; r < R; ++r)
            __builtin_memcpy(last[r], bytes + r * stride + (strips.row_chunks - 1) * Codes::BYTES,
                             static_cast<size_t>(strips.tail));
        multiply(last[0], Codes::BYTES, strips.count() - 1, 1, 1, 0);
    }
    for (int r = 0; r < R; ++r) {
        const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n + r * n_step) : 0.0f;
        for (int m = 0; m < M; ++m)
            store_one(a.y, a.x_dtype, (m0 + m) * a.n + n + r * n_step, hsum(totals[r][m]) + bias);
    }
}

// A panel of `rows`, up to M.
template <class Codes, int R, int M>
void codes_panel_of(int64_t rows, const CodesCall& call, int64_t n, int64_t n_step, int64_t m0, const float* scaling) {
    if constexpr (M > 1)
        if (rows < M) return codes_panel_of<Codes, R, M - 1>(rows, call, n, n_step, m0, scaling);
    codes_panel<Codes, R, M>(call, n, n_step, m0, scaling);
}

// R rows of w times all rows of x, in panels of up to M.
template <class Codes, int R, int M>
void codes_rows(const CodesCall& call, int64_t n, int64_t n_step, float* memory) {
    float* scaling = memory;                            // [strip][2][R]
    float* row = memory + 2 * R * call.strips.count();  // [groups]
    take_scaling<Codes, R>(call, n, n_step, row, scaling);
    for (int64_t panel = 0; panel < call.x.panels; ++panel) {
        const int64_t m0 = call.x.panel_row(panel);
        codes_panel_of<Codes, R, M>(call.x.panel_row(panel + 1) - m0, call, n, n_step, m0, scaling);
    }
}

template <class Codes, int R, int M>
void run_codes_of(const CodesCall& call) {
    parallel_for(call.a.n, worth_threads(call.a), [&](int64_t begin, int64_t end) {
        float* memory = scratch_floats(Scratch::TASK, static_cast<size_t>(2 * R * call.strips.count() + call.groups));
        const int64_t part = (end - begin) / R;
        for (int64_t n = begin; n < begin + part; ++n) codes_rows<Codes, R, M>(call, n, part, memory);
        for (int64_t n = begin + R * part; n < end; ++n) codes_rows<Codes, 1, M>(call, n, 0, memory);
    });
}

// False if these arguments must go another way.
template <class Codes>
bool run_codes(const LinearArgs& a, const GroupArgs& g, const void* codes, int64_t row_bytes) {
    const int64_t strip = a.k > 0 && a.m <= CODES_ROWS ? strip_columns<Codes>(g) : 0;
    if (strip == 0 || (a.m > CODES_PANEL_SHORT && strip < CODES_SHORT)) return false;
    const int64_t whole = row_bytes / Codes::BYTES, chunks = strip / Codes::COLUMNS, tail = row_bytes % Codes::BYTES;
    const CodesStrips strips{whole / chunks, chunks, whole % chunks, tail, whole + (tail > 0)};
    CodesX x;
    x.ld = strips.row_chunks * Codes::COLUMNS;
    x.sums_ld = strips.count() * F32::WIDTH;
    x.rows = a.m;
    x.panels = (a.m + CODES_PANEL - 1) / CODES_PANEL;
    x.x = scratch_floats(Scratch::CALL, static_cast<size_t>(a.m * (x.ld + x.sums_ld)));
    x.sums = x.x + a.m * x.ld;
    x.groups = static_cast<int32_t*>(scratch(Scratch::GROUPS, static_cast<size_t>(strips.count()) * sizeof(int32_t)));
    for (int64_t i = 0; i < strips.count(); ++i)
        x.groups[i] =
            g.group_size >= a.k ? 0 : static_cast<int32_t>(strips.first_chunk(i) * Codes::COLUMNS / g.group_size);
    for (int64_t panel = 0; panel < x.panels; ++panel) {
        const int64_t m0 = x.panel_row(panel), rows = x.panel_row(panel + 1) - m0;
        for (int64_t i = 0; i < rows; ++i)
            if (!unfold_codes_x<Codes>(a, m0 + i, i, rows, strips, x)) return false;
    }
    const CodesCall call{
        a, g, strips, x, static_cast<const uint8_t*>(codes), row_bytes, (a.k + g.group_size - 1) / g.group_size};
    a.m > 2 ? run_codes_of<Codes, 3, CODES_PANEL>(call) : run_codes_of<Codes, 4, 2>(call);
    return true;
}
