// The instances of tile_kernel: plan.row_tiles chooses, plan.token_tiles may be fewer than the instance's.
#pragma once

#include "cuda/linear/launch_tile.h"
#include "cuda/linear/tile.h"

namespace llmkern::cuda {

template <class Format>
void launch_mma(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const TileArgs to = tile_args<Format>(name, args, row_bytes, plan);
    by_type(name, args.linear.x_dtype, [&](auto type) {
        // Stages: what fits into 99 KiB (sm_86, sm_89, sm_120) with room for a second block on sm_80 and sm_90.
        using Few = Tile<Format, decltype(type), 4, 1, 4, 2, 5>;
        using Many = Tile<Format, decltype(type), 4, 2, 8, 1, 4>;
        if (plan.row_tiles * 16 == Few::ROWS && plan.token_tiles * 8 <= Few::TOKENS)
            return launch_tile<Few>(name, tile_kernel<Few>, args.linear, to);
        if (plan.row_tiles * 16 == Many::ROWS && plan.token_tiles * 8 <= Many::TOKENS)
            return launch_tile<Many>(name, tile_kernel<Many>, args.linear, to);
        no_instance(name, plan);
    });
}

}  // namespace llmkern::cuda
