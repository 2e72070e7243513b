// From an op's arguments to one of the instances of tile_kernel or wgmma_kernel. The Python side (ops/_cuda.py) chooses
// the sizes and has checked the tensors.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/linear/linear.h"
#include "cuda/linear/tile_feed.h"

namespace llmkern::cuda {

template <class Format>
TileArgs tile_args(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const LinearArgs& l = args.linear;
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const int groups = int((l.k + args.group_size - 1) / args.group_size);
    if (groups > 1 && args.group_size % Format::LANE_COLUMNS)
        throw std::runtime_error(std::string(name) + ": no multiple of " + std::to_string(Format::LANE_COLUMNS) +
                                 " columns in a group: " + std::to_string(args.group_size));
    return {l.x,
            static_cast<const uint8_t*>(args.codes),
            row_bytes,
            args.scales,
            args.scales_dtype,
            args.zeros,
            groups,
            int(args.group_size),
            int(l.k),
            plan.splits,
            8 * plan.token_tiles,
            l.k % 8 == 0 && aligned(l.x),
            row_bytes % 16 == 0 && aligned(args.codes),
            {l.bias, l.bias_dtype, l.y, l.m, l.n}};
}

template <class Tile>
void launch_tile(const char* name, void (*kernel)(TileArgs), const LinearArgs& l, const TileArgs& args) {
    Grid grid;
    grid.x = unsigned((l.n + Tile::ROWS - 1) / Tile::ROWS);
    grid.y = grid.cluster_y = unsigned(args.splits);
    grid.z = unsigned((l.m + args.tokens - 1) / args.tokens);
    grid.threads = Tile::THREADS;
    grid.shared_bytes = Tile::BYTES;
    launch(name, kernel, grid, l.stream, args);
}

[[noreturn]] inline void no_tile(const char* name, const Plan& plan) {
    throw std::runtime_error(std::string(name) + ": no instance for " + std::to_string(plan.row_tiles) +
                             " tiles of rows and " + std::to_string(plan.token_tiles) + " of tokens");
}

// start(Bf16{}) or start(F16{}), by the type of x.
template <class Start>
void by_type(const char* name, DType dtype, Start start) {
    if (dtype == DType::BF16) return start(Bf16{});
    if (dtype == DType::F16) return start(F16{});
    throw std::runtime_error(std::string(name) + ": x must be bf16 or fp16");
}

}  // namespace llmkern::cuda
