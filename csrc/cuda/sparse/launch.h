// From the arguments of an op over 2:4 weights to an instance of a kernel. The Python side (ops/_cuda.py) chooses the
// sizes and has checked the tensors.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/sparse/kept.h"
#include "cuda/sparse/sparse.h"

namespace llmkern::cuda {

// What an instance is chosen by, besides the plan.
struct SparseCall {
    const char* name;
    SparseArgs args;
    bool one_scale;  // per row
    bool aligned;
    void* stream;

    void launch(void (*kernel)(SparseArgs), const Plan& plan, int threads, size_t shared_bytes) const {
        Grid grid;
        grid.x = unsigned((args.out.n + 16 * plan.row_tiles - 1) / (16 * plan.row_tiles));
        grid.y = grid.cluster_y = unsigned(plan.splits);
        grid.z = unsigned((args.out.m + 8 * plan.token_tiles - 1) / (8 * plan.token_tiles));
        grid.threads = unsigned(threads);
        grid.shared_bytes = shared_bytes;
        cuda::launch(name, kernel, grid, stream, args);
    }

    [[noreturn]] void no_instance(const Plan& plan) const {
        throw std::runtime_error(std::string(name) + ": no instance for " + std::to_string(plan.row_tiles) +
                                 " tiles of rows and " + std::to_string(plan.token_tiles) + " of tokens");
    }
};

template <class Format>
SparseCall sparse_call(const char* name, const KeptArgs& from, int row_bytes, int splits) {
    const LinearArgs& l = from.linear;
    const int groups = int((l.k + from.group_size - 1) / from.group_size);
    SparseCall call{name,
                    {l.x,
                     static_cast<const uint8_t*>(from.values),
                     row_bytes,
                     from.positions,
                     from.scales,
                     from.scales_dtype,
                     groups,
                     int(from.group_size),
                     int(l.k),
                     splits,
                     {l.bias, l.bias_dtype, l.y, l.m, l.n}},
                    groups == 1,
                    false,
                    l.stream};
    if (from.scales && groups > 1 && from.group_size % PART_COLUMNS)
        throw std::runtime_error(std::string(name) + ": no multiple of " + std::to_string(PART_COLUMNS) +
                                 " columns in a group: " + std::to_string(from.group_size));
    const auto at = [](const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    call.aligned = l.k % Format::LANE_COLUMNS == 0 && at(l.x, 16) && at(from.values, 16) && at(from.positions, 4);
    return call;
}

// run(Bf16{}) or run(F16{}), by x's type.
template <class Run>
void for_type_of_x(const char* name, DType dtype, const Run& run) {
    if (dtype == DType::BF16) return run(Bf16{});
    if (dtype == DType::F16) return run(F16{});
    throw std::runtime_error(std::string(name) + ": x must be bf16 or fp16");
}

}  // namespace llmkern::cuda
