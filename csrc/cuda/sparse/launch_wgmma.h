// Instances of sparse_wgmma_kernel.
#pragma once

#include "cuda/sparse/launch.h"
#include "cuda/sparse/wgmma_tile.h"

namespace llmkern::cuda {

template <class Tile>
void launch_sparse_wgmma_instance(const SparseCall& call) {
    using Feed = typename Tile::Feed;
    const SparseArgs& args = call.args;
    const Output& out = args.out;
    constexpr int ROWS = Feed::BLOCKS * Tile::ROWS;
    Grid grid;
    grid.x = unsigned(Feed::BLOCKS * ((out.n + ROWS - 1) / ROWS) * ((out.m + Tile::TOKENS - 1) / Tile::TOKENS));
    grid.y = grid.cluster_y = unsigned(args.splits);
    grid.cluster_x = Feed::BLOCKS;
    grid.threads = Tile::THREADS;
    grid.shared_bytes = size_t(Tile::SHARED);
    grid.overlap = true;
    const int64_t x_bytes = int64_t(args.k) * 2, position_bytes = args.k / 8;
    launch(call.name, sparse_wgmma_kernel<Tile>, grid, call.stream, args,
           tensor_map(call.name, args.x, x_bytes, out.m, x_bytes, TILE_ROW_BYTES, Feed::X_ROWS),
           tensor_map(call.name, args.values, args.row_bytes, out.n, args.row_bytes, Feed::UNITS * 16, Tile::ROWS),
           tensor_map(call.name, args.positions, position_bytes, out.n, position_bytes, 16, Tile::ROWS));
}

template <class Format, class T, SparseScaled SCALED>
void launch_sparse_wgmma(const SparseCall& call, const Plan& plan) {
    if (plan.row_tiles != 16 || plan.splits > call.args.k / SPARSE_STAGE) no_instance(call.name, plan);
    if (plan.token_tiles != 8 && plan.token_tiles != 16) no_instance(call.name, plan);
    // Scales of every product leave no registers for more rows of x.
    if constexpr (SCALED != SparseScaled::PRODUCTS) {
        if (plan.token_tiles == 16 && 2 * plan.splits <= CLUSTER_BLOCKS)
            return launch_sparse_wgmma_instance<SparseWgmma<Format, T, 128, SCALED, true>>(call);
        if (plan.token_tiles == 16)
            return launch_sparse_wgmma_instance<SparseWgmma<Format, T, 128, SCALED, false>>(call);
    }
    launch_sparse_wgmma_instance<SparseWgmma<Format, T, 64, SCALED, false>>(call);
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
