// Which tile of y a block has. Blocks that run together shall share rows of w and of x, so eight tiles of tokens take
// turns.
#pragma once

#include "cuda/common/values.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

template <int ROWS, int TOKENS>
LLMKERN_DEVICE void tile_of(const Output& out, int block, int64_t& first_row, int64_t& first_token) {
    const int row_tiles = int((out.n + ROWS - 1) / ROWS), token_tiles = int((out.m + TOKENS - 1) / TOKENS);
    const int band = block / (8 * row_tiles), in_band = block - band * 8 * row_tiles;
    const int width = smaller(token_tiles - 8 * band, 8);
    first_row = int64_t(in_band / width) * ROWS;
    first_token = int64_t(8 * band + in_band % width) * TOKENS;
}

}  // namespace llmkern::cuda
