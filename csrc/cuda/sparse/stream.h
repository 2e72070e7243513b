// Few rows of x and 2:4 weights: as linear/stream.h, weights go from memory straight to the registers of a product,
// which here is a sparse one (kept.h). A block has ROW_TILES * 16 rows of w and TOKEN_TILES * 8 rows of x; its warps
// and the blocks of its cluster divide K.
//
// x: a product wants of lane (g, c), for row g of x, half c % 2 of its quads c / 2 and 2 + c / 2 of the first and of
// the second four, which are quads of the runs of lanes c / 2 and 2 + c / 2. Lanes c and c ^ 1 want the same four
// quads, so each loads those of one run, 16 bytes at a time, and gives the other its halves: half the loads and half
// the registers of loading both.
#pragma once

#include "cuda/sparse/kept.h"

namespace llmkern::cuda {

constexpr int SPARSE_WARPS = 8;

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int DEPTH, Scaled SCALED, bool ALIGNED>
struct SparseStream {
    using Rows = KeptRows<Format, T, ROW_TILES, SCALED, ALIGNED>;
    using Stage = typename Rows::Stage;
    static constexpr int PARTS = Rows::PARTS;
    using Part = uint32_t[TOKEN_TILES][PART_COLUMNS / 2];

    const SparseArgs& args;
    const Rows rows;
    const int64_t first_token;
    const int g = thread() % 32 / 4, c = thread() % 4;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    Part x[PARTS];  // of a chunk; the next chunk's is on its way as soon as a part's halves are exchanged

    LLMKERN_DEVICE SparseStream(const SparseArgs& args, int64_t first_row, int64_t first_token)
        : args(args), rows{args, first_row}, first_token(first_token) {}

    LLMKERN_DEVICE void load_x(Part& to, int chunk, int part) const {
        const int column = chunk * Rows::CHUNK + (c / 2 + c % 2 * 2) * Rows::LANE + part * PART_COLUMNS;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            const int64_t token = first_token + 8 * t + g;
            const uint16_t* const row = static_cast<const uint16_t*>(args.x) + token * args.k;
#pragma unroll
            for (int i = 0; i < PART_COLUMNS; i += 8) {
                const Words4 v = token < args.out.m ? load_halves<ALIGNED>(row, column + i, args.k) : Words4{};
#pragma unroll
                for (int j = 0; j < 4; j++) to[t][i / 2 + j] = v.w[j];
            }
        }
    }

    // Two quads of this lane's run, four words, to the right factor of the product that takes them.
    LLMKERN_DEVICE void exchange(const uint32_t* mine, uint32_t (&b)[4]) const {
        const bool odd = c & 1;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t other = shuffle_xor(odd ? mine[i] : mine[i + 1], 1);
            b[i] = odd ? other : mine[i];
            b[i + 1] = odd ? mine[i + 1] : other;
        }
    }

    LLMKERN_DEVICE void multiply(const Stage& stage, int next) {
        float sums[ROW_TILES][TOKEN_TILES][4] = {};
        auto& into = SCALED == Scaled::SUMS ? sums : acc;
        uint32_t positions[ROW_TILES][PARTS];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) Rows::positions(stage, r, positions[r]);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            uint32_t b[2][TOKEN_TILES][4];
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                for (int s = 0; s < 2; s++) exchange(x[part][t] + 4 * s, b[s][t]);
            load_x(x[part], next, part);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                uint32_t a[2][4];
                rows.factors(stage, r, part, a);
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++) {
                    mma_sparse<T, 0>(into[r][t], a[0], b[0][t], positions[r][part]);
                    mma_sparse<T, 1>(into[r][t], a[1], b[1][t], positions[r][part]);
                }
            }
        }
        if (SCALED == Scaled::SUMS) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        acc[r][t][i] += bits_to_float(stage.scale[r][i / 2][0], args.scales_dtype) * sums[r][t][i];
        }
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + Rows::CHUNK - 1) / Rows::CHUNK;
        const int step = SPARSE_WARPS * args.splits;
        const int first = split * SPARSE_WARPS + thread() / 32;
        Stage stages[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (first + d * step < chunks) rows.load(stages[d], first + d * step);
#pragma unroll
        for (int part = 0; part < PARTS; part++) load_x(x[part], first, part);
        for (int chunk = first; chunk < chunks; chunk += DEPTH * step)
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (chunk + d * step < chunks) multiply(stages[d], chunk + (d + 1) * step);
                if (chunk + (d + DEPTH) * step < chunks) rows.load(stages[d], chunk + (d + DEPTH) * step);
            }
        reduce_and_store<T, ROW_TILES, TOKEN_TILES, SPARSE_WARPS>(acc, args.out, rows.first_row, first_token, split,
                                                                  args.splits);
    }
};

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int DEPTH, Scaled SCALED, bool ALIGNED>
__global__ void __launch_bounds__(SPARSE_WARPS * 32) sparse_stream_kernel(SparseArgs args) {
    SparseStream<Format, T, ROW_TILES, TOKEN_TILES, DEPTH, SCALED, ALIGNED> stream(
        args, int64_t(block_x()) * ROW_TILES * 16, int64_t(block_z()) * TOKEN_TILES * 8);
    stream.run(block_y());
}

}  // namespace llmkern::cuda
