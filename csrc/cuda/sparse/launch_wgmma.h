// Instances of sparse_wgmma_kernel.
#pragma once

#include "cuda/sparse/launch.h"
#include "cuda/sparse/wgmma_tile.h"

namespace llmkern::cuda {

template <class Format, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
void launch_sparse_wgmma_instance(const SparseCall& call) {
    using Tile = SparseWarpgroupTile<Format, T, TOKEN_TILES, SCALED, ALIGNED>;
    call.launch(sparse_wgmma_kernel<Format, T, TOKEN_TILES, SCALED, ALIGNED>,
                {Tile::ROWS / 16, TOKEN_TILES, call.args.splits}, Tile::THREADS, Tile::SHARED);
}

template <class Format, class T, Scaled SCALED>
void launch_sparse_wgmma(const SparseCall& call, const Plan& plan) {
    if (plan.row_tiles != 8) no_instance(call.name, plan);
    if (plan.token_tiles == 8) return launch_sparse_wgmma_instance<Format, T, 8, SCALED, true>(call);
    if (plan.token_tiles == 16) return launch_sparse_wgmma_instance<Format, T, 16, SCALED, true>(call);
    no_instance(call.name, plan);
}

// Only what is aligned: the rest is cuda.mma's.
template <class Format>
void launch_sparse_wgmma(const char* name, const KeptArgs& args, int row_bytes, const Plan& plan) {
    const SparseCall call = sparse_call<Format>(name, args, row_bytes, plan.splits);
    if (!call.aligned) throw std::runtime_error(std::string(name) + ": rows or pointers are not aligned");
    by_type(name, args.linear.x_dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<Format, Kept16>) {
            launch_sparse_wgmma<Format, T, Scaled::NOT>(call, plan);
        } else {
            if (call.one_scale) return launch_sparse_wgmma<Format, T, Scaled::SUMS>(call, plan);
            launch_sparse_wgmma<Format, T, Scaled::WEIGHTS>(call, plan);
        }
    });
}

}  // namespace llmkern::cuda
