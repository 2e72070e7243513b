// From an op's arguments to one of the instances of stream_kernel. The Python side (ops/_cuda.py `plan`) chooses the
// sizes and has checked the tensors.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/linear/linear.h"
#include "cuda/linear/stream.h"

namespace llmkern::cuda {

template <class Format, class T>
void launch_stream(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const LinearArgs& l = args.linear;
    const int groups = int((l.k + args.group_size - 1) / args.group_size);
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
    if (l.n * groups > INT32_MAX || l.n * row_bytes / 16 > UINT32_MAX)  // what the kernel counts in 32 bits
        throw std::runtime_error(std::string(name) + ": the weight is too large");
    const bool coarse = groups == 1 || args.group_size % (4 * Format::LANE_COLUMNS) == 0;
    if (!coarse && args.group_size % Format::LANE_COLUMNS)
        throw std::runtime_error(std::string(name) + ": no multiple of " + std::to_string(Format::LANE_COLUMNS) +
                                 " columns in a group: " + std::to_string(args.group_size));
    const bool aligned =
        row_bytes % 16 == 0 && l.k % 8 == 0 && aligned16(l.x) && aligned16(args.codes) && l.n >= 16 * plan.row_tiles;
    const auto start = [&](auto kernel, int row_tiles, int token_tiles) {
        Grid grid;
        grid.x = unsigned((l.n + 16 * row_tiles - 1) / (16 * row_tiles));
        grid.y = grid.cluster_y = unsigned(plan.splits);
        grid.z = unsigned((l.m + 8 * token_tiles - 1) / (8 * token_tiles));
        grid.threads = STREAM_WARPS * 32;
        grid.overlap = true;
        grid.shared_bytes = size_t(row_tiles) * token_tiles * 4 * 32 * STREAM_WARPS * sizeof(float);
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
    throw std::runtime_error(std::string(name) + ": no instance for " + std::to_string(plan.row_tiles) +
                             " tiles of rows and " + std::to_string(plan.token_tiles) + " of tokens");
}

template <class Format>
void launch_stream(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    if (args.linear.x_dtype == DType::BF16) return launch_stream<Format, Bf16>(name, args, row_bytes, plan);
    if (args.linear.x_dtype == DType::F16) return launch_stream<Format, F16>(name, args, row_bytes, plan);
    throw std::runtime_error(std::string(name) + ": x must be bf16 or fp16");
}

}  // namespace llmkern::cuda
