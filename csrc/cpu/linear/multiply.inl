// Many rows of x: a tile of TILE_ROWS rows by TILE_K columns is decoded to L1/L2 and multiplied with all of x, which is
// packed with rows of x side by side, so that one decoded weight is broadcast against a vector of rows:
//
//   packed x: panels [k][PANEL]     tile: [n][k]      sums: [n][m], PANEL wide; written to y transposed at the end
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// Sums start again from 0 after this many columns, because the rounding error of one long chain grows with its length.
constexpr int CHAIN_COLUMNS = 128;

// 2 vectors of x rows by this many rows of w fill the registers: 24 + 3 of 32, or 12 + 3 of 16; with four lanes 16 +
// 10, because on AArch64 compilers load every weight of a step before they use the first.
constexpr int STEP_ROWS = F32::WIDTH == 4 && REGISTERS == 32 ? 8 : REGISTERS == 32 ? 12 : 6;
constexpr int PANEL = 2 * F32::WIDTH;
constexpr int TILE_ROWS = 48;
// A panel of x by TILE_K (32 KiB with 16 lanes) should stay in L1, and x by TILE_K (256 KiB) in L2.
constexpr int TILE_K = 256;
constexpr int TILE_LD = TILE_K + 16;  // not a power of two: rows of a tile should not share cache sets
constexpr int BLOCK_M = 256;

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

// y[m0 .. m0 + block, n0 .. n0 + rows) = sums[rows][ld] transposed, plus the bias.
LLMKERN_INLINE void write_sums(const LinearArgs& a, const float* sums, int64_t ld, int64_t m0, int64_t block,
                               int64_t n0, int rows) {
    for (int r = 0; r < rows; r += F32::WIDTH) {
        const int count = rows - r < F32::WIDTH ? rows - r : F32::WIDTH;
        const F32 bias = a.bias ? load_as(a.bias, a.bias_dtype, n0 + r, count) : zero();
        for (int64_t m = 0; m < block; ++m) {
            const F32 column = load_strided(sums + r * ld + m, ld, count);
            store_as(a.y, a.x_dtype, (m0 + m) * a.n + n0 + r, column + bias, count);
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

    write_sums(a, sums, ld, m0, block, n0, rows);
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
