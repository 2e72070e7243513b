// More rows of x and 2:4 weights: a block has 128 rows of w, 16 * ROW_TILES for each of ROW_WARPS warps, and 8 *
// TOKEN_TILES rows of x for each of TOKEN_WARPS. Weights go from memory straight to registers (kept.h), DEPTH chunks
// ahead; x goes through shared memory, STAGES chunks at a time, where all warps read it. The blocks of a cluster divide
// K.
//
// In shared memory a row of x has, for each part of a chunk, eight segments of 16 bytes. Segment 4s + i is what the
// four lanes of that row want for register i of the right factor of product s: the same quad of two neighbouring runs.
// Segments are permuted by the row of x, so that the rows of a matrix are in different banks.
#pragma once

#include "cuda/linear/store_tile.h"
#include "cuda/sparse/kept.h"

namespace llmkern::cuda {

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, Scaled SCALED,
          bool ALIGNED, int STAGES = 4 * PART_COLUMNS / Format::LANE_COLUMNS>
struct SparseTile {
    // Scales of rows wait for the end.
    using Rows = KeptRows<Format, T, ROW_TILES, SCALED == Scaled::WEIGHTS ? SCALED : Scaled::NOT, ALIGNED>;
    using Stage = typename Rows::Stage;
    static constexpr int PARTS = Rows::PARTS, DEPTH = 2;
    static constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
    static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, TOKENS = 8 * TOKEN_TILES * TOKEN_WARPS;
    static constexpr int PART_BYTES = TOKENS * 128, STAGE_BYTES = PARTS * PART_BYTES;
    static constexpr int SUMS_BYTES = tile_floats<ROWS, TOKENS> * int(sizeof(float));
    static constexpr int SHARED = STAGES * STAGE_BYTES > SUMS_BYTES ? STAGES * STAGE_BYTES : SUMS_BYTES;

    const SparseArgs& args;
    const int lane = thread() % 32;
    const int first_warp_row = thread() / 32 % ROW_WARPS * 16 * ROW_TILES;
    const int first_warp_token = thread() / 32 / ROW_WARPS * 8 * TOKEN_TILES;
    const int64_t first_row, first_token;
    const Rows rows{args, first_row + first_warp_row};
    float acc[ROW_TILES][TOKEN_TILES][4] = {};

    LLMKERN_DEVICE SparseTile(const SparseArgs& args, int64_t first_row, int64_t first_token)
        : args(args), first_row(first_row), first_token(first_token) {}

    // A quad of x at a time; neighbouring threads take neighbouring quads.
    LLMKERN_DEVICE void copy_x(int stage, int chunk) const {
        constexpr int QUADS = Rows::CHUNK / 4, STEP = THREADS / QUADS;
        static_assert(STEP % 8 == 0, "a thread's rows of x are permuted alike");
        const int first = thread() / QUADS, quad = thread() % QUADS;
        const int q = quad % 4, part = quad / 4 % PARTS, run = quad / 4 / PARTS;
        const int segment = q / 2 * 4 + q % 2 * 2 + run / 2;
        uint8_t* const to = shared_memory() + stage * STAGE_BYTES + part * PART_BYTES + first * 128 +
                            (segment ^ first % 8) * 16 + run % 2 * 8;
        const int column = chunk * Rows::CHUNK + 4 * quad;
        const int rows = column < args.k ? int(smaller<int64_t>(args.out.m - first_token, TOKENS)) : 0;
        const uint16_t* const from = static_cast<const uint16_t*>(args.x) + (first_token + first) * args.k + column;
#pragma unroll
        for (int i = 0; i < TOKENS; i += STEP) {
            const bool inside = first + i < rows;
            if (ALIGNED) {
                copy_async8(to + i * 128, inside ? static_cast<const void*>(from + int64_t(i) * args.k) : args.x,
                            inside ? 8 : 0);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    reinterpret_cast<uint16_t*>(to + i * 128)[j] =
                        inside && column + j < args.k ? from[int64_t(i) * args.k + j] : 0;
            }
        }
    }

    LLMKERN_DEVICE void multiply(const Stage& stage, int x_stage) {
        // Lane 8i + j points to row j of x in segment i of the first product; that of the second is four segments on.
        const uint8_t* const x = shared_memory() + x_stage * STAGE_BYTES + (first_warp_token + lane % 8) * 128;
        const int segment = (lane / 8 ^ lane % 8) * 16;
        uint32_t positions[ROW_TILES][PARTS];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) Rows::positions(stage, r, positions[r]);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            uint32_t a[ROW_TILES][2][4];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) rows.factors(stage, r, part, a[r]);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++) {
                uint32_t b[2][4];
#pragma unroll
                for (int s = 0; s < 2; s++) load_matrices(b[s], x + part * PART_BYTES + t * 1024 + (segment ^ s * 64));
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    mma_sparse<T, 0>(acc[r][t], a[r][0], b[0], positions[r][part]);
                    mma_sparse<T, 1>(acc[r][t], a[r][1], b[1], positions[r][part]);
                }
            }
        }
    }

    LLMKERN_DEVICE void finish(int split) {
        copy_async_wait<0>();
        sync_block();
        put_tile<ROWS>(acc, first_warp_row, first_warp_token);
        const auto scale = [this](int64_t row) {
            return SCALED == Scaled::SUMS ? load_float(args.scales, row, args.scales_dtype) : 1.0f;
        };
        store_tile<T, ROWS, TOKENS, THREADS>(args.out, first_row, first_token, split, args.splits, scale);
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + Rows::CHUNK - 1) / Rows::CHUNK;
        const int count = (chunks - split + args.splits - 1) / args.splits;  // this block's: split, split + splits, ...
        const auto chunk = [&](int i) { return split + i * args.splits; };
        Stage stages[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (d < count) rows.load(stages[d], chunk(d));
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) {
            if (i < count) copy_x(i, chunk(i));
            copy_async_commit();
        }
        for (int first = 0; first < count; first += DEPTH)
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int i = first + d;
                if (i >= count) break;
                copy_async_wait<STAGES - 2>();
                sync_block();  // x is there, and nobody reads what the next copy overwrites
                if (i + STAGES - 1 < count) copy_x((i + STAGES - 1) % STAGES, chunk(i + STAGES - 1));
                copy_async_commit();
                multiply(stages[d], i % STAGES);
                if (i + DEPTH < count) rows.load(stages[d], chunk(i + DEPTH));
            }
        finish(split);
    }
};

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, Scaled SCALED,
          bool ALIGNED>
__global__ void __launch_bounds__(32 * ROW_WARPS * TOKEN_WARPS, 1) sparse_tile_kernel(SparseArgs args) {
    using Tile = SparseTile<Format, T, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, SCALED, ALIGNED>;
    Tile tile(args, int64_t(block_x()) * Tile::ROWS, int64_t(block_z()) * Tile::TOKENS);
    tile.run(block_y());
}

}  // namespace llmkern::cuda
