// From an op's arguments to one of the instances of stream_kernel. The Python side (ops/_cuda.py `codes_plan`) chooses
// the sizes and has checked the tensors.
#pragma once

#include "cuda/linear/launch.h"
#include "cuda/linear/stream.h"

namespace llmkern::cuda {

template <class Format, class T>
void launch_stream(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const LinearArgs& l = args.linear;
    const int groups = groups_of(l.k, args.group_size);
    StreamArgs to{l.x,
                  static_cast<const uint8_t*>(args.codes),
                  row_bytes,
                  args.scales,
                  args.scales_dtype,
                  args.zeros,
                  groups,
                  Divisor::of(uint32_t(args.group_size)),
                  int(l.k),
                  plan.splits,
                  {l.bias, l.bias_dtype, l.y, l.m, l.n}};
    if (l.n * groups > INT32_MAX)  // the kernel counts scales in 32 bits
        throw std::runtime_error(std::string(name) + ": more than 2^31 scales");
    const bool coarse = groups == 1 || args.group_size % (4 * Format::LANE_COLUMNS) == 0;
    if (!coarse) check_group_multiple(name, groups, args.group_size, Format::LANE_COLUMNS);
    const bool aligned = row_bytes % 16 == 0 && l.k % 8 == 0 && aligned_to(l.x, 16) && aligned_to(args.codes, 16) &&
                         l.n >= 16 * plan.row_tiles;
    const auto start = [&](auto kernel, int row_tiles, int token_tiles) {
        const size_t bytes = size_t(row_tiles) * token_tiles * 4 * 32 * STREAM_WARPS * sizeof(float);
        Grid grid = tile_grid(l.n, l.m, 16 * row_tiles, 8 * token_tiles, plan.splits, STREAM_WARPS * 32, bytes);
        grid.overlap = true;
        launch(name, kernel, grid, l.stream, to);
    };
#define LLMKERN_STREAM(rows, tokens, depth)                                                         \
    if (plan.row_tiles == rows && plan.token_tiles == tokens)                                       \
    return coarse ? start(stream_kernel<Format, T, rows, tokens, depth, false, true>, rows, tokens) \
                  : start(stream_kernel<Format, T, rows, tokens, depth, true, true>, rows, tokens)
    // Groups of any number of lanes' columns, and scales per row: what is not aligned takes the finer way throughout.
    if (!aligned) return start(stream_kernel<Format, T, 1, 1, 1, true, false>, 1, 1);
    LLMKERN_STREAM(1, 1, 4);
    LLMKERN_STREAM(2, 1, 2);
    LLMKERN_STREAM(4, 2, 2);
#undef LLMKERN_STREAM
    no_instance(name, plan);
}

template <class Format>
void launch_stream(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    by_type(name, args.linear.x_dtype,
            [&](auto type) { launch_stream<Format, decltype(type)>(name, args, row_bytes, plan); });
}

}  // namespace llmkern::cuda
