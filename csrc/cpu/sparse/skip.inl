// Many rows of x: sums over the kept values alone. Where half of the columns are pruned this is half of the
// multiplications of a dense product.
//
// Rows of w keep different columns, so they share no vectors of x; instead a kept value is broadcast against as many
// rows of x as registers hold, and nearly every load is the operand of a multiplication:
//
//   x, packed: blocks of block_columns columns, [column][V vectors of x rows], and below them a row of zeros
//   w, per block: the kept values of a row side by side, and where in the block of x their columns are
//
//        kept value, place --> one broadcast, V multiplications with x[place]     V sums of a row of w in registers
//
// An x block stays in L1 while all rows of a tile pass it. Included inside namespace llmkern::LLMKERN_NS.

#ifdef LLMKERN_COMPACT

#include "cpu/columns/transpose.inl"

constexpr int MOST_VECTORS = 8;
constexpr int SKIP_ROWS = 96;  // of w at most in a tile
constexpr int SKIP_BLOCK_M = 512;

// Vectors of x rows in a panel: as even a split as possible, because a panel of one vector costs a load per
// multiplication more.
LLMKERN_INLINE int panel_vectors(int64_t rows) {
    const int64_t vectors = (rows + F32::WIDTH - 1) / F32::WIDTH;
    const int64_t panels = (vectors + MOST_VECTORS - 1) / MOST_VECTORS;
    return static_cast<int>((vectors + panels - 1) / panels);
}

// Rows of w at a time: enough sums to hide the latency of a multiplication.
constexpr int rows_together(int vectors) { return vectors <= 3 ? 3 : vectors <= 6 ? 2 : 1; }

// Columns of a block: at most 16 KiB (32 KiB with 16 lanes) of x, and no longer a chain of sums than in a dense tile.
constexpr int block_columns(int vectors) { return vectors <= 4 ? CHAIN_COLUMNS : CHAIN_COLUMNS / 2; }

// Rows of w in a tile: many, for each reads all of x, but enough tiles for the threads; whole steps of rows_together.
LLMKERN_INLINE int64_t skip_tile_rows(int64_t n, int threads) {
    constexpr int64_t STEP = 12;
    static_assert(SKIP_ROWS % STEP == 0, "tiles are whole steps");
    const int64_t even = (n / (4 * threads) + STEP - 1) / STEP * STEP;
    return even < STEP ? STEP : even < SKIP_ROWS ? even : SKIP_ROWS;
}

// One vector of x rows from row m, columns [k0, k1) of a block; missing ones are 0.
LLMKERN_INLINE void pack_rows(const LinearArgs& a, int64_t m, int64_t rows, int64_t k0, int64_t k1, float* to,
                              int64_t stride) {
    for (int64_t k = k0; k < k1; k += F32::WIDTH) {
        const int64_t left = a.k - k;
        const int count = left >= F32::WIDTH ? F32::WIDTH : left > 0 ? static_cast<int>(left) : 0;
        F32 x[F32::WIDTH];
        for (int i = 0; i < F32::WIDTH; ++i)
            x[i] = i < rows ? load_as(a.x, a.x_dtype, (m + i) * a.k + k, count) : zero();
        transpose(x);
        for (int i = 0; i < F32::WIDTH; ++i) store(to + (k - k0 + i) * stride, x[i]);
    }
}

// The kept values of a tile's rows in one block of columns: `ld` apart, and as many in every `together` rows.
struct KeptTile {
    float* values;
    uint16_t* places;  // byte offsets into a block of x
    int ld, together;
    int counts[SKIP_ROWS];
};

// A block has a line or a few of each row, too few for the machine to see where the next row's are.
constexpr int ROWS_AHEAD = 12;

// Decodes columns [k0, k0 + columns) of `rows` rows, `at` being there. A row with fewer values than those beside it
// gets zeros at the block's row of zeros.
template <class Source>
void keep_block(const Source& source, typename Source::Cursor* at, int rows, int64_t k, int64_t k0, int columns,
                int stride, KeptTile& tile) {
    const int64_t chunks = ((k < k0 + columns ? k : k0 + columns) - k0) / CHUNK<Source>;
    const int64_t rest = k < k0 + columns ? k % CHUNK<Source> : 0;
    const int64_t per_group = source.group_chunks(), into = k0 / CHUNK<Source> % per_group;
    for (int r0 = 0; r0 < rows; r0 += tile.together) {
        int longest = 0;
        for (int r = r0; r < r0 + tile.together; ++r) {
            if (r + ROWS_AHEAD < rows) source.ask(at[r + ROWS_AHEAD], columns);
            float* values = tile.values + r * tile.ld;
            uint16_t* places = tile.places + r * tile.ld;
            int count = 0;
            for (int64_t chunk = 0, left = into ? per_group - into : 0; r < rows && chunk * CHUNK<Source> < columns;
                 ++chunk, --left) {
                if (chunk == chunks && rest == 0) break;
                if (left == 0) {
                    source.group(at[r]);
                    left = per_group;
                }
                const int first = static_cast<int>(chunk * CHUNK<Source>);
                if (chunk == chunks) {
                    count +=
                        source.keep_last(at[r], values + count, places + count, first, stride, static_cast<int>(rest));
                    break;
                }
                count += source.keep(at[r], values + count, places + count, first, stride);
            }
            tile.counts[r] = count;
            if (count > longest) longest = count;
        }
        for (int r = r0; r < r0 + tile.together; ++r) {
            for (int i = tile.counts[r]; i < longest; ++i) {
                tile.values[r * tile.ld + i] = 0;
                tile.places[r * tile.ld + i] = static_cast<uint16_t>(columns * stride);
            }
            tile.counts[r] = longest;
        }
    }
}

// sums[r][0 .. V * WIDTH) (+)= the kept values of a tile's rows times a block of x. The block behind it comes next.
template <int V>
void multiply_kept(const KeptTile& tile, int rows, const float* x, float* sums, int64_t ld, bool first) {
    constexpr int ROWS = rows_together(V), BLOCK_BYTES = (block_columns(V) + 1) * V * F32::WIDTH * 4;
    const int lines = (BLOCK_BYTES / 64 + rows - 1) / rows * ROWS;
    const auto* ahead = reinterpret_cast<const uint8_t*>(x) + BLOCK_BYTES;
    for (int r0 = 0; r0 < rows; r0 += ROWS) {
        for (int i = 0; i < lines; ++i, ahead += 64) prefetch_far(ahead);
        const float* values = tile.values + r0 * tile.ld;
        const uint16_t* places = tile.places + r0 * tile.ld;
        F32 acc[ROWS][V];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = zero();
        for (int i = 0; i < tile.counts[r0]; ++i)
            for (int r = 0; r < ROWS; ++r) {
                const F32 w = set1(values[r * tile.ld + i]);
                const auto* at =
                    reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(x) + places[r * tile.ld + i]);
                for (int v = 0; v < V; ++v) acc[r][v] = fma(w, load(at + v * F32::WIDTH), acc[r][v]);
            }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) {
                float* sum = sums + (r0 + r) * ld + v * F32::WIDTH;
                store(sum, first ? acc[r][v] : load(sum) + acc[r][v]);
            }
    }
}

// Two vectors or fewer keep the dense tile (dense_rows).
using MultiplyKept = void (*)(const KeptTile&, int, const float*, float*, int64_t, bool);
constexpr MultiplyKept MULTIPLY_KEPT[MOST_VECTORS + 1] = {nullptr,          nullptr,          nullptr,
                                                          multiply_kept<3>, multiply_kept<4>, multiply_kept<5>,
                                                          multiply_kept<6>, multiply_kept<7>, multiply_kept<8>};

template <class Source>
void skip_zeros(const LinearArgs& a, const Source& source, int threads) {
    static_assert(block_columns(MOST_VECTORS) % CHUNK<Source> == 0, "a chunk must not cross blocks");
    const int64_t most = a.m < SKIP_BLOCK_M ? a.m : SKIP_BLOCK_M;
    const int vectors = panel_vectors(most), columns = block_columns(vectors), together = rows_together(vectors);
    const int width = vectors * F32::WIDTH, stride = width * static_cast<int>(sizeof(float));
    const int64_t blocks = (a.k + columns - 1) / columns, block_floats = (columns + 1) * width;
    const int64_t most_panels = (most + width - 1) / width;
    float* packed = scratch_floats(Scratch::CALL, most_panels * blocks * block_floats);
    const int64_t tile_rows = skip_tile_rows(a.n, threads);
    const int ld = columns * Source::MOST_KEPT / CHUNK<Source>;

    for (int64_t m0 = 0; m0 < a.m; m0 += SKIP_BLOCK_M) {
        const int64_t block_m = a.m - m0 < SKIP_BLOCK_M ? a.m - m0 : SKIP_BLOCK_M;
        const int64_t panels = (block_m + width - 1) / width, sums_ld = panels * width;
        parallel_for(blocks * panels, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                float* to = packed + i * block_floats;
                const int64_t k0 = i / panels * columns;
                for (int v = 0; v < vectors; ++v, to += F32::WIDTH) {
                    const int64_t m = (i % panels * vectors + v) * F32::WIDTH;
                    pack_rows(a, m0 + m, block_m - m, k0, k0 + columns, to, width);
                    store(to + columns * width, zero());
                }
            }
        });
        parallel_for((a.n + tile_rows - 1) / tile_rows, threads, [&](int64_t begin, int64_t end) {
            const int64_t kept = tile_rows * ld + CHUNK<Source>;  // a row's last vector may reach into the next row
            float* memory =
                scratch_floats(Scratch::TASK, tile_rows * (sums_ld + source.buffer_floats()) + kept + (kept + 1) / 2);
            float* sums = memory;
            float* buffer = sums + tile_rows * sums_ld;
            KeptTile tile;
            tile.values = buffer + tile_rows * source.buffer_floats();
            tile.places = reinterpret_cast<uint16_t*>(tile.values + kept);
            tile.ld = ld;
            tile.together = together;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t n0 = i * tile_rows;
                const int rows = static_cast<int>(a.n - n0 < tile_rows ? a.n - n0 : tile_rows);
                typename Source::Cursor at[SKIP_ROWS];
                for (int r = 0; r < rows; ++r) source.start(at[r], n0 + r, buffer + r * source.buffer_floats());
                for (int64_t block = 0; block < blocks; ++block) {
                    keep_block(source, at, rows, a.k, block * columns, columns, stride, tile);
                    for (int64_t p = 0; p < panels; ++p)
                        MULTIPLY_KEPT[vectors](tile, rows, packed + (block * panels + p) * block_floats,
                                               sums + p * width, sums_ld, block == 0);
                }
                write_sums(a, sums, sums_ld, m0, block_m, n0, rows);
            }
        });
    }
}

// Up to here a dense tile: with few vectors of x rows, taking the kept values apart weighs as much as the zeros do. A
// row of a bitmask takes longer, for where its next values are is known only when these are counted.
constexpr int64_t dense_rows(Count count) { return count == Count::TWO_OF_FOUR ? 16 : 128; }

#endif

// y = x @ wᵀ + bias for a weight with zeros that `source` decodes.
template <class Source>
void run_sparse(const LinearArgs& a, const Source& source) {
#ifdef LLMKERN_COMPACT
    if (a.k > 0 && a.m > dense_rows(Source::COUNT)) return skip_zeros(a, source, worth_threads(a));
#endif
    run_linear(a, source);
}
