// Instances of sparse_stream_kernel.
#pragma once

#include "cuda/sparse/launch.h"
#include "cuda/sparse/stream.h"

namespace llmkern::cuda {

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int DEPTH, Scaled SCALED, bool ALIGNED>
void launch_sparse_stream_instance(const SparseCall& call) {
    constexpr size_t SHARED = reduce_floats<ROW_TILES * TOKEN_TILES * 4, SPARSE_WARPS> * sizeof(float);
    call.launch(sparse_stream_kernel<Format, T, ROW_TILES, TOKEN_TILES, DEPTH, SCALED, ALIGNED>,
                {ROW_TILES, TOKEN_TILES, call.args.splits}, SPARSE_WARPS * 32, SHARED);
}

template <class Format, class T, Scaled SCALED>
void launch_sparse_stream(const SparseCall& call, const Plan& plan) {
#define LLMKERN_STREAM(rows, tokens, depth)                   \
    if (plan.row_tiles == rows && plan.token_tiles == tokens) \
    return launch_sparse_stream_instance<Format, T, rows, tokens, depth, SCALED, true>(call)
    LLMKERN_STREAM(1, 1, 4);
    LLMKERN_STREAM(2, 1, 4);
    // Decoding takes the registers of two more tiles.
    constexpr int ROWS = SCALED == Scaled::NOT ? 4 : 2;
    LLMKERN_STREAM(ROWS, 2, 2);
#undef LLMKERN_STREAM
    no_instance(call.name, plan);
}

template <class Format>
void launch_sparse_stream(const char* name, const KeptArgs& args, int row_bytes, const Plan& plan) {
    const SparseCall call = sparse_call<Format>(name, args, row_bytes, plan.splits);
    by_type(name, args.linear.x_dtype, [&](auto type) {
        using T = decltype(type);
        // What is not aligned takes the finest way throughout.
        if constexpr (std::is_same_v<Format, Kept16>) {
            if (!call.aligned) return launch_sparse_stream_instance<Format, T, 1, 1, 1, Scaled::NOT, false>(call);
            launch_sparse_stream<Format, T, Scaled::NOT>(call, plan);
        } else {
            if (!call.aligned) return launch_sparse_stream_instance<Format, T, 1, 1, 1, Scaled::WEIGHTS, false>(call);
            if (call.one_scale || args.group_size % (4 * Format::LANE_COLUMNS) == 0)
                return launch_sparse_stream<Format, T, Scaled::SUMS>(call, plan);
            launch_sparse_stream<Format, T, Scaled::WEIGHTS>(call, plan);
        }
    });
}

}  // namespace llmkern::cuda
