// From an op's arguments to one of the instances of tile_kernel. The Python side (ops/_cuda.py) chooses
// the sizes and has checked the tensors.
#pragma once

#include "cuda/linear/launch.h"
#include "cuda/linear/tile_feed.h"

namespace llmkern::cuda {

template <class Format>
TileArgs tile_args(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const LinearArgs& l = args.linear;
    const int groups = groups_of(l.k, args.group_size);
    check_group_multiple(name, groups, args.group_size, Format::LANE_COLUMNS);
    const int64_t group_units = groups > 1 ? args.group_size / Format::LANE_COLUMNS : 1;
    return {l.x,
            static_cast<const uint8_t*>(args.codes),
            row_bytes,
            args.scales,
            args.scales_dtype,
            args.zeros,
            groups,
            Divisor::of(uint32_t(group_units)),
            int(l.k),
            plan.splits,
            8 * plan.token_tiles,
            l.k % 8 == 0 && aligned_to(l.x, 16),
            row_bytes % 16 == 0 && aligned_to(args.codes, 16),
            {l.bias, l.bias_dtype, l.y, l.m, l.n}};
}

template <class Tile>
void launch_tile(const char* name, void (*kernel)(TileArgs), const LinearArgs& l, const TileArgs& args) {
    const Grid grid = tile_grid(l.n, l.m, Tile::ROWS, args.tokens, args.splits, Tile::THREADS, Tile::BYTES);
    launch(name, kernel, grid, l.stream, args);
}

}  // namespace llmkern::cuda
