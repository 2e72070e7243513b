// The instances of wgmma_kernel, by plan.row_tiles and plan.token_tiles.
#pragma once

#include "cuda/linear/launch_tile.h"
#include "cuda/linear/wgmma_tile.h"

namespace llmkern::cuda {

template <class Format>
void launch_wgmma(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const TileArgs to = tile_args<Format>(name, args, row_bytes, plan);
    by_type(name, args.linear.x_dtype, [&](auto type) {
#define LLMKERN_WGMMA_TILE(rows, tokens)                                           \
    using Tile##rows##x##tokens = WgmmaTile<Format, decltype(type), rows, tokens>; \
    if (plan.row_tiles == 8 * rows && plan.token_tiles * 8 == tokens)              \
    return launch_tile<Tile##rows##x##tokens>(name, wgmma_kernel<Tile##rows##x##tokens>, args.linear, to)
        LLMKERN_WGMMA_TILE(1, 64);
        LLMKERN_WGMMA_TILE(1, 80);
        LLMKERN_WGMMA_TILE(1, 96);
        LLMKERN_WGMMA_TILE(1, 128);
        LLMKERN_WGMMA_TILE(2, 128);
#undef LLMKERN_WGMMA_TILE
        no_instance(name, plan);
    });
}

}  // namespace llmkern::cuda
