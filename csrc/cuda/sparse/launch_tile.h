// Instances of sparse_tile_kernel.
#pragma once

#include "cuda/sparse/launch.h"
#include "cuda/sparse/tile.h"

namespace llmkern::cuda {

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, Scaled SCALED,
          bool ALIGNED>
void launch_sparse_tile_instance(const SparseCall& call) {
    using Tile = SparseTile<Format, T, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, SCALED, ALIGNED>;
    call.launch(sparse_tile_kernel<Format, T, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, SCALED, ALIGNED>,
                {Tile::ROWS / 16, Tile::TOKENS / 8, call.args.splits}, Tile::THREADS, Tile::SHARED);
}

template <class Format, class T, Scaled SCALED>
void launch_sparse_tile(const SparseCall& call, const Plan& plan) {
    if (plan.row_tiles != 8) no_instance(call.name, plan);
    if (plan.token_tiles == 4) return launch_sparse_tile_instance<Format, T, 1, 4, 8, 1, SCALED, true>(call);
    if (plan.token_tiles == 8) return launch_sparse_tile_instance<Format, T, 1, 8, 8, 1, SCALED, true>(call);
    if (plan.token_tiles == 16) return launch_sparse_tile_instance<Format, T, 2, 8, 4, 2, SCALED, true>(call);
    no_instance(call.name, plan);
}

template <class Format>
void launch_sparse_tile(const char* name, const KeptArgs& args, int row_bytes, const Plan& plan) {
    const SparseCall call = sparse_call<Format>(name, args, row_bytes, plan.splits);
    by_type(name, args.linear.x_dtype, [&](auto type) {
        using T = decltype(type);
        // What is not aligned takes the finest way throughout.
        if constexpr (std::is_same_v<Format, Kept16>) {
            if (!call.aligned) return launch_sparse_tile_instance<Format, T, 1, 8, 8, 1, Scaled::NOT, false>(call);
            launch_sparse_tile<Format, T, Scaled::NOT>(call, plan);
        } else {
            if (!call.aligned) return launch_sparse_tile_instance<Format, T, 1, 8, 8, 1, Scaled::WEIGHTS, false>(call);
            if (call.one_scale) return launch_sparse_tile<Format, T, Scaled::SUMS>(call, plan);
            launch_sparse_tile<Format, T, Scaled::WEIGHTS>(call, plan);
        }
    });
}

}  // namespace llmkern::cuda
