// The end of a product whose columns were divided among warps and among the blocks of a cluster: the sums meet in a
// fixed order, so that a result does not depend on who came first.
#pragma once

#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/linear.h"

namespace llmkern::cuda {

// Where the accumulators of ROW_TILES x TOKEN_TILES products of 16 rows and 8 tokens go.
struct Output {
    const void* bias;
    DType bias_dtype;
    void* y;
    int64_t m, n;
};

// Shared memory in floats: every warp's sums, the first warp's then the block's.
template <int VALUES, int WARPS>
constexpr int reduce_floats = WARPS * VALUES * 32;

// acc: this warp's part of [ROW_TILES * 16 rows, TOKEN_TILES * 8 tokens], in mma's layout of d; floats, or integers,
// whose sums are exact. `splits`: the blocks of the cluster, `split`: which of them this is. Every block of the cluster
// gives its share of the sums to put(row, token, sum).
template <int ROW_TILES, int TOKEN_TILES, int WARPS, class V, class Put>
LLMKERN_DEVICE void reduce_tiles(const V (&acc)[ROW_TILES][TOKEN_TILES][4], const Output& out, int64_t first_row,
                                 int64_t first_token, int split, int splits, const Put& put) {
    constexpr int VALUES = ROW_TILES * TOKEN_TILES * 4, ALL = VALUES * 32;
    V* const sums = reinterpret_cast<V*>(shared_memory());
    const int warp = thread() / 32, lane = thread() % 32;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp * ALL + ((r * TOKEN_TILES + t) * 4 + i) * 32 + lane] = acc[r][t][i];
    sync_block();
    for (int at = thread(); at < ALL; at += WARPS * 32) {
        V sum = sums[at];
#pragma unroll
        for (int w = 1; w < WARPS; w++) sum += sums[w * ALL + at];
        sums[at] = sum;
    }
    splits > 1 ? sync_cluster() : sync_block();
    for (int at = thread() + split * WARPS * 32; at < ALL; at += splits * WARPS * 32) {
        V sum = sums[at];
        if (splits > 1) {
            sum = 0;
            for (int rank = 0; rank < splits; rank++) sum += load_cluster(sums + at, rank);
        }
        const int from = at % 32, value = at / 32, i = value % 4, tile = value / 4;
        const int64_t row = first_row + tile / TOKEN_TILES * 16 + from / 4 + i / 2 * 8;
        const int64_t token = first_token + tile % TOKEN_TILES * 8 + from % 4 * 2 + i % 2;
        if (row < out.n && token < out.m) put(row, token, sum);
    }
    if (splits > 1) sync_cluster();  // nobody leaves while another reads its memory
}

// The same into y, whose type is T.
template <class T, int ROW_TILES, int TOKEN_TILES, int WARPS>
LLMKERN_DEVICE void reduce_and_store(const float (&acc)[ROW_TILES][TOKEN_TILES][4], const Output& out,
                                     int64_t first_row, int64_t first_token, int split, int splits) {
    reduce_tiles<ROW_TILES, TOKEN_TILES, WARPS>(
        acc, out, first_row, first_token, split, splits, [&](int64_t row, int64_t token, float sum) {
            if (out.bias) sum += load_float(out.bias, row, out.bias_dtype);
            static_cast<uint16_t*>(out.y)[token * out.n + row] = to_bits<T>(sum);
        });
}

}  // namespace llmkern::cuda
