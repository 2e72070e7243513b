// Linear layers with activations kept: x in fp32, weights decoded to fp32 on the way, fp32 sums.
//
// A weight format gives a Source, which decodes one row from left to right in chunks of CHUNK columns:
//
//   struct Source {
//       static constexpr int VECTORS;            // vectors per chunk; CHUNK = VECTORS * F32::WIDTH
//       static constexpr int column(int p);      // the column, within a chunk, that lane p of a decoded chunk holds
//       struct Cursor;                           // where in a row we are
//       int64_t group_chunks() const;            // chunks per scale group (any large number if there are no groups)
//       int64_t buffer_floats() const;           // floats of scratch that a cursor needs
//       void start(Cursor&, int64_t row, float* buffer) const;
//       void group(Cursor&) const;               // called before the first chunk of every group
//       void next(Cursor&, F32 (&w)[VECTORS]) const;               // decode a whole chunk and move on
//       void last(Cursor&, F32 (&w)[VECTORS], int columns) const;  // the short chunk that ends a row: reads nothing
//   };                                                             // past the row; lanes past it: any finite value
//
// Decoded weights include their scale. `column` lets a format yield its natural order (int4: even columns, then odd
// ones): x is permuted to it once per call, instead of every weight. A Source is used by several threads at once.
//
// Few rows of x (up to 8): each decoded vector is used at once for all of them; weights stream from memory
// past x, which stays in L1/L2.
//
//        k ->                       k ->
//   w  [ c0 | c1 | ...        x  [ m0 ............ ]      R rows of w by M rows of x: R * M sums in registers
//   w  [ c0 | c1 | ...           [ m1 ............ ]
//
// More rows: a tile of TILE_ROWS rows by TILE_K columns is decoded to L1/L2 and multiplied with all of x, which is
// packed with rows of x side by side, so that one decoded weight is broadcast against a vector of rows:
//
//   packed x: panels [k][PANEL]     tile: [n][k]      sums: [n][m], PANEL wide; written to y transposed at the end
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// Sums start again from 0 after this many columns (few rows: chunks per lane), because the rounding error of one long
// chain grows with its length.
constexpr int CHAIN_COLUMNS = 128, STRIP_CHUNKS = 64;

// How far ahead of its reading a source should prefetch its weights, in bytes. Several rows are read at once, so the
// distance must pass all of them; 16 KiB measured twice as fast as 1 KiB for 4 rows of 4 KiB.
constexpr int64_t PREFETCH_AHEAD = 16384;

constexpr int REGISTERS = F32::WIDTH == 16 ? 32 : 16;

// 2 vectors of x rows by this many rows of w fill the registers: 24 + 3 of 32, or 12 + 3 of 16.
constexpr int STEP_ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int PANEL = 2 * F32::WIDTH;
constexpr int TILE_ROWS = 48;
// A panel of x by TILE_K (32 KiB with 16 lanes) should stay in L1, and x by TILE_K (256 KiB) in L2.
constexpr int TILE_K = 256;
constexpr int TILE_LD = TILE_K + 16;  // not a power of two: rows of a tile should not share cache sets
constexpr int BLOCK_M = 256;

template <class Source>
constexpr int CHUNK = Source::VECTORS * F32::WIDTH;

// Calls use(chunk, w) with the decoded weights w[R][VECTORS] of chunks [begin, end) of R rows.
template <int R, class Source, class Use>
LLMKERN_INLINE void walk(const Source& source, typename Source::Cursor (&at)[R], int64_t begin, int64_t end, Use use) {
    const int64_t per_group = source.group_chunks();
    int64_t left = begin == 0 ? per_group : per_group - begin % per_group;  // chunks of the group
    for (int64_t chunk = begin; chunk < end; left = per_group) {
        if (left == per_group)
            for (int r = 0; r < R; ++r) source.group(at[r]);
        for (const int64_t stop = left < end - chunk ? chunk + left : end; chunk < stop; ++chunk) {
            F32 w[R][Source::VECTORS];
            for (int r = 0; r < R; ++r) source.next(at[r], w[r]);
            use(chunk, w);
        }
    }
}

// The same for the short chunk after `chunk` whole ones.
template <int R, class Source, class Use>
LLMKERN_INLINE void walk_last(const Source& source, typename Source::Cursor (&at)[R], int64_t chunk, int columns,
                              Use use) {
    if (chunk % source.group_chunks() == 0)
        for (int r = 0; r < R; ++r) source.group(at[r]);
    F32 w[R][Source::VECTORS];
    for (int r = 0; r < R; ++r) source.last(at[r], w[r], columns);
    use(chunk, w);
}

// ---- Few rows of x ----

// x as fp32 rows of `ld` floats, permuted to the source's order and padded with zeros to whole chunks.
template <class Source>
void unfold_x(const LinearArgs& a, int64_t ld, int rows, float* to) {
    for (int64_t i = 0; i < rows; ++i) {
        float* row = to + i * ld;
        for (int64_t k0 = 0; k0 < ld; k0 += CHUNK<Source>) {
            float part[CHUNK<Source>] = {};
            const int64_t count = i >= a.m ? 0 : a.k - k0 < CHUNK<Source> ? a.k - k0 : CHUNK<Source>;
            convert_row(part, a.x, a.x_dtype, i * a.k + k0, count);
            for (int p = 0; p < CHUNK<Source>; ++p) row[k0 + p] = part[Source::column(p)];
        }
    }
}

// y[:, n0 .. n0 + R) for M rows of x, of which the first a.m exist.
template <int M, int R, class Source>
void stream_rows(const LinearArgs& a, const Source& source, const float* x, int64_t ld, int64_t n0, float* buffer) {
    // With few sums, one per vector of a chunk keeps more multiplications in flight.
    constexpr int CHAINS = R * M * Source::VECTORS <= REGISTERS / 4 ? Source::VECTORS : 1;
    typename Source::Cursor at[R];
    for (int r = 0; r < R; ++r) source.start(at[r], n0 + r, buffer + r * source.buffer_floats());
    F32 sums[R][M][CHAINS], totals[R][M];
    const auto multiply = [&](int64_t chunk, F32(&w)[R][Source::VECTORS]) __attribute__((always_inline)) {
        for (int v = 0; v < Source::VECTORS; ++v)
            for (int m = 0; m < M; ++m) {
                const F32 xv = load(x + m * ld + chunk * CHUNK<Source> + v * F32::WIDTH);
                for (int r = 0; r < R; ++r) sums[r][m][v % CHAINS] = fma(w[r][v], xv, sums[r][m][v % CHAINS]);
            }
    };
    const int64_t whole = a.k / CHUNK<Source>;
    for (int64_t strip = 0; strip == 0 || strip < whole; strip += STRIP_CHUNKS) {
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m)
                for (int c = 0; c < CHAINS; ++c) sums[r][m][c] = zero();
        const int64_t end = strip + STRIP_CHUNKS < whole ? strip + STRIP_CHUNKS : whole;
        walk(source, at, strip, end, multiply);
        const int columns = static_cast<int>(a.k % CHUNK<Source>);
        if (end == whole && columns) walk_last(source, at, whole, columns, multiply);
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) {
                for (int c = 1; c < CHAINS; ++c) sums[r][m][0] = sums[r][m][0] + sums[r][m][c];
                totals[r][m] = strip == 0 ? sums[r][m][0] : totals[r][m] + sums[r][m][0];
            }
    }

    for (int m = 0; m < M; ++m) {
        if (m >= a.m) break;
        for (int r = 0; r < R; ++r) {
            const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n0 + r) : 0.0f;
            store_one(a.y, a.x_dtype, m * a.n + n0 + r, hsum(totals[r][m]) + bias);
        }
    }
}

template <int M, class Source>
void stream(const LinearArgs& a, const Source& source, int threads) {
    constexpr int FIT = REGISTERS / 2 / M;
    constexpr int R = FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
    const int64_t ld = (a.k + CHUNK<Source> - 1) / CHUNK<Source> * CHUNK<Source>;
    float* x = scratch_floats(Scratch::CALL, M * ld);
    unfold_x<Source>(a, ld, M, x);
    parallel_for((a.n + R - 1) / R, threads, [&](int64_t begin, int64_t end) {
        float* buffer = scratch_floats(Scratch::TASK, R * source.buffer_floats());
        for (int64_t n0 = begin * R; n0 < end * R; n0 += R) {
            if (n0 + R <= a.n)
                stream_rows<M, R>(a, source, x, ld, n0, buffer);
            else
                for (int64_t n = n0; n < a.n; ++n) stream_rows<M, 1>(a, source, x, ld, n, buffer);
        }
    });
}

// ---- Many rows of x ----

// One panel of `rows` x rows from m0 as [k][PANEL], positions [p0, p1) in the source's order; missing ones are 0.
template <class Source>
void pack_panel(const LinearArgs& a, int64_t m0, int rows, int64_t p0, int64_t p1, float* panel) {
    for (int64_t chunk = p0; chunk < p1; chunk += CHUNK<Source>) {
        float part[PANEL][CHUNK<Source>];
        const int64_t count = a.k - chunk < CHUNK<Source> ? a.k - chunk : CHUNK<Source>;
        for (int i = 0; i < PANEL; ++i) {
            for (int p = 0; p < CHUNK<Source>; ++p) part[i][p] = 0;
            if (i < rows) convert_row(part[i], a.x, a.x_dtype, (m0 + i) * a.k + chunk, count);
        }
        for (int p = 0; p < CHUNK<Source>; ++p)
            for (int i = 0; i < PANEL; ++i) panel[(chunk + p) * PANEL + i] = part[i][Source::column(p)];
    }
}

// sums[r][0 .. V * WIDTH) (+)= tile rows r .. r + ROWS times a panel, over `depth` columns.
template <int V, int ROWS>
void multiply_step(const float* tile, const float* panel, int64_t depth, float* sums, int64_t ld, bool first) {
    for (int64_t k0 = 0; k0 < depth; k0 += CHAIN_COLUMNS) {
        const int64_t k1 = k0 + CHAIN_COLUMNS < depth ? k0 + CHAIN_COLUMNS : depth;
        F32 acc[ROWS][V];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = zero();
        for (int64_t k = k0; k < k1; ++k) {
            F32 x[V];
            for (int v = 0; v < V; ++v) x[v] = load(panel + k * PANEL + v * F32::WIDTH);
            for (int r = 0; r < ROWS; ++r) {
                const F32 w = set1(tile[r * TILE_LD + k]);
                for (int v = 0; v < V; ++v) acc[r][v] = fma(w, x[v], acc[r][v]);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) {
                float* sum = sums + r * ld + v * F32::WIDTH;
                store(sum, first && k0 == 0 ? acc[r][v] : load(sum) + acc[r][v]);
            }
    }
}

// y[m0 .. m0 + block, n0 .. n0 + rows) from packed x.
template <class Source>
void multiply_tile(const LinearArgs& a, const Source& source, const float* packed, int64_t depth, int64_t m0,
                   int64_t block, int64_t n0, int rows, float* memory) {
    const int64_t panels = (block + PANEL - 1) / PANEL, ld = panels * PANEL;
    float* tile = memory;
    float* sums = tile + TILE_ROWS * TILE_LD;
    float* buffer = sums + TILE_ROWS * ld;
    typename Source::Cursor at[TILE_ROWS][1];
    for (int r = 0; r < rows; ++r) source.start(at[r][0], n0 + r, buffer + r * source.buffer_floats());

    for (int64_t k0 = 0; k0 < depth; k0 += TILE_K) {
        const int64_t k1 = k0 + TILE_K < depth ? k0 + TILE_K : depth;
        for (int r = 0; r < rows; ++r) {
            const auto keep = [&](int64_t chunk, F32(&w)[1][Source::VECTORS]) __attribute__((always_inline)) {
                for (int v = 0; v < Source::VECTORS; ++v)
                    store(tile + r * TILE_LD + chunk * CHUNK<Source> - k0 + v * F32::WIDTH, w[0][v]);
            };
            const int64_t whole = (k1 < a.k ? k1 : a.k) / CHUNK<Source>;
            walk(source, at[r], k0 / CHUNK<Source>, whole, keep);
            if (k1 > a.k) walk_last(source, at[r], whole, static_cast<int>(a.k % CHUNK<Source>), keep);
        }
        for (int64_t p = 0; p < panels; ++p) {
            const float* panel = packed + (p * depth + k0) * PANEL;
            const bool half = block - p * PANEL <= F32::WIDTH;
            for (int r = 0; r < rows; r += STEP_ROWS) {
                float* to = sums + r * ld + p * PANEL;
                if (half)
                    multiply_step<1, STEP_ROWS>(tile + r * TILE_LD, panel, k1 - k0, to, ld, k0 == 0);
                else
                    multiply_step<2, STEP_ROWS>(tile + r * TILE_LD, panel, k1 - k0, to, ld, k0 == 0);
            }
        }
    }

    float bias[TILE_ROWS] = {};
    if (a.bias) convert_row(bias, a.bias, a.bias_dtype, n0, rows);
    for (int64_t m = 0; m < block; ++m) {
        float out[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; ++r) out[r] = sums[r * ld + m] + bias[r];
        for (int r = 0; r < rows; r += F32::WIDTH) {
            const int count = rows - r < F32::WIDTH ? rows - r : F32::WIDTH;
            store_as(a.y, a.x_dtype, (m0 + m) * a.n + n0 + r, load(out + r), count);
        }
    }
}

template <class Source>
void multiply(const LinearArgs& a, const Source& source, int threads) {
    static_assert(TILE_K % CHUNK<Source> == 0, "a chunk must not cross tiles");
    static_assert(TILE_ROWS % STEP_ROWS == 0 && TILE_ROWS % F32::WIDTH == 0, "tiles are whole steps");
    const int64_t depth = (a.k + CHUNK<Source> - 1) / CHUNK<Source> * CHUNK<Source>;
    const int64_t most = a.m < BLOCK_M ? a.m : BLOCK_M, most_panels = (most + PANEL - 1) / PANEL;
    float* packed = scratch_floats(Scratch::CALL, most_panels * PANEL * depth);
    for (int64_t m0 = 0; m0 < a.m; m0 += BLOCK_M) {
        const int64_t block = a.m - m0 < BLOCK_M ? a.m - m0 : BLOCK_M, panels = (block + PANEL - 1) / PANEL;
        const int64_t strips = (depth + TILE_K - 1) / TILE_K;
        parallel_for(panels * strips, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t p = i / strips, p0 = i % strips * TILE_K, m = p * PANEL;
                const int rows = static_cast<int>(block - m < PANEL ? block - m : PANEL);
                pack_panel<Source>(a, m0 + m, rows, p0, p0 + TILE_K < depth ? p0 + TILE_K : depth,
                                   packed + p * depth * PANEL);
            }
        });
        parallel_for((a.n + TILE_ROWS - 1) / TILE_ROWS, threads, [&](int64_t begin, int64_t end) {
            float* memory = scratch_floats(
                Scratch::TASK, TILE_ROWS * (TILE_LD + panels * PANEL + static_cast<size_t>(source.buffer_floats())));
            for (int64_t i = begin; i < end; ++i) {
                const int64_t n0 = i * TILE_ROWS;
                const int rows = static_cast<int>(a.n - n0 < TILE_ROWS ? a.n - n0 : TILE_ROWS);
                multiply_tile(a, source, packed, depth, m0, block, n0, rows, memory);
            }
        });
    }
}

// Threads worth waking: one for work that one core does in about the time a wake-up takes (20 us).
LLMKERN_INLINE int worth_threads(const LinearArgs& a) {
    const double vectors = static_cast<double>(a.n) * static_cast<double>(a.k) / F32::WIDTH;
    const double nanoseconds = vectors * (0.5 + 0.15 * static_cast<double>(a.m));
    return nanoseconds < 20e3 ? 1 : a.threads;
}

// y without any columns of x: the bias, or 0.
LLMKERN_INLINE void write_bias(const LinearArgs& a) {
    for (int64_t m = 0; m < a.m; ++m)
        for (int64_t n = 0; n < a.n; ++n) {
            const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n) : 0.0f;
            store_one(a.y, a.x_dtype, m * a.n + n, bias);
        }
}

// y = x @ wᵀ + bias for the weight that `source` decodes.
template <class Source>
void run_linear(const LinearArgs& a, const Source& source) {
    if (a.k == 0) return write_bias(a);
    const int threads = worth_threads(a);
    switch (a.m) {
        case 1:
            return stream<1>(a, source, threads);
        case 2:
            return stream<2>(a, source, threads);
        case 3:
        case 4:
            return stream<4>(a, source, threads);
        case 5:
        case 6:
            return stream<6>(a, source, threads);
        case 7:
        case 8:
            return stream<8>(a, source, threads);
        default:
            return multiply(a, source, threads);
    }
}
