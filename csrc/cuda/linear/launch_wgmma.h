// The instances of wgmma_kernel, by plan.row_tiles and plan.token_tiles.
#pragma once

#include <algorithm>

#include "cuda/linear/launch_tile.h"
#include "cuda/linear/wgmma_tile.h"

namespace llmkern::cuda {

// Blocks that go from tile to tile, as many as there are multiprocessors; or a cluster per tile, whose blocks divide K.
template <class Format, class T, int WARPGROUPS, int TOKENS>
void launch_wgmma_tile(const char* name, const LinearArgs& l, const TileArgs& tile) {
    using Ring = WgmmaRing<Format, T, WARPGROUPS, TOKENS>;
    constexpr int ROWS = Ring::BLOCKS * Ring::ROWS;
    if (l.m > INT32_MAX - TOKENS || l.n > INT32_MAX - ROWS || l.n * tile.groups > INT32_MAX)
        throw std::runtime_error(std::string(name) + ": more rows or scales than 32 bits count");
    WgmmaArgs args{tile, int((l.n + ROWS - 1) / ROWS), int((l.m + TOKENS - 1) / TOKENS), 0,
                   tile.x_aligned && tile.codes_aligned && l.k > 0};
    const int64_t tiles = int64_t(args.row_blocks) * args.token_blocks;
    if (tiles > INT32_MAX / 2) throw std::runtime_error(std::string(name) + ": too many tiles of y");
    const int64_t room = std::max(multiprocessors(name) / Ring::BLOCKS, 1);
    args.blocks = int(tile.splits > 1 ? tiles : std::min(tiles, room));
    Grid grid;
    grid.x = unsigned(args.blocks * Ring::BLOCKS);
    grid.cluster_x = Ring::BLOCKS;
    grid.y = grid.cluster_y = unsigned(tile.splits);
    grid.threads = Ring::THREADS;
    grid.shared_bytes = Ring::BYTES;
    grid.overlap = true;
    TensorMap x{}, codes{};
    if (args.engine) {
        const int64_t x_bytes = 2 * l.k;
        x = tensor_map(name, l.x, x_bytes, l.m, x_bytes, TILE_ROW_BYTES, Ring::X_ROWS);
        codes = tensor_map(name, tile.codes, tile.row_bytes, l.n, tile.row_bytes, Ring::PITCH, Ring::ROWS);
    }
    launch(name, wgmma_kernel<Format, T, WARPGROUPS, TOKENS>, grid, l.stream, args, x, codes);
}

template <class Format>
void launch_wgmma(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    if (plan.splits < 1 || plan.splits > 8 || (plan.token_tiles > 16 && plan.splits > 1))
        throw std::runtime_error(std::string(name) + ": K is divided by up to 8, with over 128 rows of x not at all");
    const TileArgs tile = tile_args<Format>(name, args, row_bytes, plan);
    by_type(name, args.linear.x_dtype, [&](auto type) {
#define LLMKERN_WGMMA_TILE(warpgroups, tokens)                              \
    if (plan.row_tiles == 4 * warpgroups && plan.token_tiles * 8 == tokens) \
    return launch_wgmma_tile<Format, decltype(type), warpgroups, tokens>(name, args.linear, tile)
        LLMKERN_WGMMA_TILE(2, 64);
        LLMKERN_WGMMA_TILE(2, 128);
        LLMKERN_WGMMA_TILE(2, 256);
        LLMKERN_WGMMA_TILE(4, 32);
        LLMKERN_WGMMA_TILE(4, 48);
        LLMKERN_WGMMA_TILE(4, 64);
        LLMKERN_WGMMA_TILE(4, 80);
        LLMKERN_WGMMA_TILE(4, 96);
        LLMKERN_WGMMA_TILE(4, 128);
#undef LLMKERN_WGMMA_TILE
        no_instance(name, plan);
    });
}

}  // namespace llmkern::cuda
