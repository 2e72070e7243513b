// From the arguments of an op over 2:4 weights to an instance of a kernel. The Python side (ops/_cuda.py) chooses the
// sizes and has checked the tensors.
#pragma once

#include "cuda/linear/launch.h"
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
        const Grid grid = tile_grid(args.out.n, args.out.m, 16 * plan.row_tiles, 8 * plan.token_tiles, plan.splits,
                                    threads, shared_bytes);
        cuda::launch(name, kernel, grid, stream, args);
    }
};

template <class Format>
SparseCall sparse_call(const char* name, const KeptArgs& from, int row_bytes, int splits) {
    const LinearArgs& l = from.linear;
    const int groups = groups_of(l.k, from.group_size);
    SparseCall call{name,
                    {l.x,
                     static_cast<const uint8_t*>(from.values),
                     row_bytes,
                     from.positions,
                     from.scales,
                     from.scales_dtype,
                     groups,
                     Divisor::of(uint32_t(from.group_size)),
                     int(l.k),
                     splits,
                     {l.bias, l.bias_dtype, l.y, l.m, l.n}},
                    groups == 1,
                    false,
                    l.stream};
    if (from.scales) check_group_multiple(name, groups, from.group_size, PART_COLUMNS);
    call.aligned = l.k % Format::LANE_COLUMNS == 0 && aligned_to(l.x, 16) && aligned_to(from.values, 16) &&
                   aligned_to(from.positions, 4);
    return call;
}

}  // namespace llmkern::cuda
