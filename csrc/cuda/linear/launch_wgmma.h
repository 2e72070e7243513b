// The instances of wgmma_kernel, by plan.row_tiles and plan.token_tiles.
#pragma once

#include <algorithm>

#include "cuda/linear/launch_tile.h"
#include "cuda/linear/wgmma_tile.h"

namespace llmkern::cuda {

// Blocks that go from tile to tile, as many as there are multiprocessors; or a cluster per tile, whose blocks divide K.
template <class Format, class T, int ROW_TILES, int TOKENS>
void launch_wgmma_tile(const char* name, const LinearArgs& l, const TileArgs& tile) {
    using Ring = WgmmaRing<Format, T, ROW_TILES, TOKENS>;
    if (l.m > INT32_MAX - TOKENS || l.n > INT32_MAX - Ring::ROWS || l.n * tile.groups > INT32_MAX)
        throw std::runtime_error(std::string(name) + ": more rows or scales than 32 bits count");
    WgmmaArgs args{tile, int((l.n + Ring::ROWS - 1) / Ring::ROWS), int((l.m + TOKENS - 1) / TOKENS), 0};
    const int64_t tiles = int64_t(args.row_blocks) * args.token_blocks;
    if (tiles > INT32_MAX / 2) throw std::runtime_error(std::string(name) + ": too many tiles of y");
    args.blocks = int(tile.splits > 1 ? tiles : std::min<int64_t>(tiles, multiprocessors(name)));
    Grid grid;
    grid.x = unsigned(args.blocks);
    grid.y = grid.cluster_y = unsigned(tile.splits);
    grid.threads = Ring::THREADS;
    grid.shared_bytes = Ring::BYTES;
    grid.overlap = true;
    launch(name, wgmma_kernel<Format, T, ROW_TILES, TOKENS>, grid, l.stream, args);
}

template <class Format>
void launch_wgmma(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    if (plan.splits != 1 && plan.splits != 2 && plan.splits != 4 && plan.splits != 8)
        throw std::runtime_error(std::string(name) + ": K is divided by 2, 4 or 8");
    const TileArgs tile = tile_args<Format>(name, args, row_bytes, plan);
    by_type(name, args.linear.x_dtype, [&](auto type) {
#define LLMKERN_WGMMA_TILE(rows, tokens)                              \
    if (plan.row_tiles == 8 * rows && plan.token_tiles * 8 == tokens) \
    return launch_wgmma_tile<Format, decltype(type), rows, tokens>(name, args.linear, tile)
        LLMKERN_WGMMA_TILE(1, 64);
        LLMKERN_WGMMA_TILE(1, 128);
        LLMKERN_WGMMA_TILE(2, 32);
        LLMKERN_WGMMA_TILE(2, 48);
        LLMKERN_WGMMA_TILE(2, 64);
        LLMKERN_WGMMA_TILE(2, 80);
        LLMKERN_WGMMA_TILE(2, 96);
        LLMKERN_WGMMA_TILE(2, 128);
        LLMKERN_WGMMA_TILE(2, 152);
#undef LLMKERN_WGMMA_TILE
        no_instance(name, plan);
    });
}

}  // namespace llmkern::cuda
