// The end of a product whose block has a tile of y: through shared memory, so that neighbouring threads write
// neighbouring elements of y, and the blocks of a cluster that divided K add up what they have.
#pragma once

#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

// Shared memory of a tile in floats: a row of x's sums after the other, whose distance keeps lanes off each other's
// banks.
template <int ROWS, int TOKENS>
constexpr int tile_floats = (ROWS + 4) * TOKENS;

// acc: this warp's part of the tile in mma's layout of d, from `row` and `token` of the tile on.
template <int ROWS, int ROW_TILES, int TOKEN_TILES>
LLMKERN_DEVICE void put_tile(const float (&acc)[ROW_TILES][TOKEN_TILES][4], int row, int token) {
    float* const sums = reinterpret_cast<float*>(shared_memory());
    const int g = thread() % 32 / 4, c = thread() % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(token + 8 * t + 2 * c + i % 2) * (ROWS + 4) + row + 16 * r + g + i / 2 * 8] = acc[r][t][i];
}

// After every warp has put its part, by all threads of all blocks of the cluster; scale(row): what a row of w's sums
// are multiplied with.
template <class T, int ROWS, int TOKENS, int THREADS, class Scale>
LLMKERN_DEVICE void store_tile(const Output& out, int64_t first_row, int64_t first_token, int split, int splits,
                               const Scale& scale) {
    const float* const sums = reinterpret_cast<const float*>(shared_memory());
    splits > 1 ? sync_cluster() : sync_block();
    for (int at = thread() + split * THREADS; at < ROWS * TOKENS; at += splits * THREADS) {
        const int64_t row = first_row + at % ROWS, token = first_token + at / ROWS;
        if (row >= out.n || token >= out.m) continue;
        const float* const mine = sums + at / ROWS * (ROWS + 4) + at % ROWS;
        float sum = *mine;
        if (splits > 1) {
            sum = 0;
            for (int rank = 0; rank < splits; rank++) sum += load_cluster(mine, rank);
        }
        sum *= scale(row);
        if (out.bias) sum += load_float(out.bias, row, out.bias_dtype);
        static_cast<uint16_t*>(out.y)[token * out.n + row] = to_bits<T>(sum);
    }
    if (splits > 1) sync_cluster();  // nobody leaves while another reads its memory
}

}  // namespace llmkern::cuda
