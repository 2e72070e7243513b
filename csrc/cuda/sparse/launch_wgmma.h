// Instances of sparse_wgmma_kernel.
#pragma once

#include "cuda/sparse/launch.h"
#include "cuda/sparse/wgmma_tile.h"

namespace llmkern::cuda {

template <class Tile>
void launch_sparse_wgmma_instance(const SparseCall& call) {
    const Output& out = call.args.out;
    Grid grid;
    grid.x = unsigned((out.n + Tile::ROWS - 1) / Tile::ROWS * ((out.m + Tile::TOKENS - 1) / Tile::TOKENS));
    grid.y = grid.cluster_y = unsigned(call.args.splits);
    grid.threads = Tile::THREADS;
    grid.shared_bytes = size_t(Tile::SHARED);
    launch(call.name, sparse_wgmma_kernel<Tile>, grid, call.stream, call.args);
}

template <class Format, class T, SparseScaled SCALED>
void launch_sparse_wgmma(const SparseCall& call, const Plan& plan) {
    if (plan.row_tiles != 16) no_instance(call.name, plan);
    if (plan.token_tiles == 8) return launch_sparse_wgmma_instance<SparseWgmma<Format, T, 64, SCALED>>(call);
    if (plan.token_tiles == 16) return launch_sparse_wgmma_instance<SparseWgmma<Format, T, 128, SCALED>>(call);
    no_instance(call.name, plan);
}

// Only what is aligned: the rest is cuda.mma's.
template <class Format>
void launch_sparse_wgmma(const char* name, const KeptArgs& args, int row_bytes, const Plan& plan) {
    const SparseCall call = sparse_call<Format>(name, args, row_bytes, plan.splits);
    if (args.linear.k % SPARSE_STAGE || !call.aligned || !aligned_to(args.positions, 16))
        throw std::runtime_error(std::string(name) + ": rows or pointers are not aligned");
    by_type(name, args.linear.x_dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<Format, Kept16>) {
            launch_sparse_wgmma<Format, T, SparseScaled::NOT>(call, plan);
        } else {
            if (call.one_scale) return launch_sparse_wgmma<Format, T, SparseScaled::SUMS>(call, plan);
            if (args.group_size % SPARSE_STAGE == 0)
                return launch_sparse_wgmma<Format, T, SparseScaled::STAGES>(call, plan);
            check_group_multiple(name, call.args.groups, args.group_size, SPARSE_STAGE / 4);
            launch_sparse_wgmma<Format, T, SparseScaled::PRODUCTS>(call, plan);
        }
    });
}

}  // namespace llmkern::cuda
