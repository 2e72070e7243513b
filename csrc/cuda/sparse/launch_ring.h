// From an op's arguments to one of the instances of ring_kernel for 2:4 weights.
#pragma once

#include "cuda/linear/launch_ring.h"
#include "cuda/sparse/ring_kept.h"
#include "cuda/sparse/sparse.h"

namespace llmkern::cuda {

template <class Format, class T, RingScales SCALES>
void launch_ring_kept(const char* name, const LinearArgs& l, const RingArgs& to, const TensorMap& values,
                      const TensorMap& positions, const Plan& plan) {
    if (plan.token_tiles == 1)
        return launch_ring<RingKept<Format, T, 1, SCALES>, T, 1>(name, l, to, values, positions, plan);
    if (plan.token_tiles == 2)
        return launch_ring<RingKept<Format, T, 2, SCALES>, T, 2>(name, l, to, values, positions, plan);
    no_instance(name, plan);
}

template <class Format>
void launch_ring_kept(const char* name, const KeptArgs& args, const Plan& plan) {
    using Kept = RingKept<Format, Bf16, 1, RingScales::ROWS>;
    const LinearArgs& l = args.linear;
    const int groups = args.scales ? groups_of(l.k, args.group_size) : 1;
    check_group_multiple(name, groups, args.group_size, Kept::CHUNK);
    if (l.k % Kept::CHUNK || l.n % Kept::ROWS || !aligned_to(l.x, 16) || !aligned_to(args.values, 16) ||
        !aligned_to(args.positions, 16) || !aligned_to(args.scales, 4) || l.n * groups > INT32_MAX)
        throw std::runtime_error(std::string(name) + ": no such sizes, or pointers that are not aligned");
    RingArgs to{};
    to.x = l.x;
    to.scales = args.scales, to.scales_dtype = args.scales_dtype;
    to.groups = groups, to.group_size = Divisor::of(uint32_t(args.scales ? args.group_size : l.k));
    to.out = {l.bias, l.bias_dtype, l.y, l.m, l.n};
    const int64_t row_bytes = l.k / Kept::CHUNK * Kept::ROW_BYTES;
    const TensorMap values = tensor_map(name, args.values, row_bytes, l.n, row_bytes, Kept::ROW_BYTES, Kept::ROWS);
    const TensorMap positions =
        tensor_map(name, args.positions, l.k / 8, l.n, l.k / 8, Kept::POSITION_BYTES, Kept::ROWS);
    by_type(name, l.x_dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (!Kept::HALVES)
            if (groups > 1) return launch_ring_kept<Format, T, RingScales::SUMS>(name, l, to, values, positions, plan);
        launch_ring_kept<Format, T, RingScales::ROWS>(name, l, to, values, positions, plan);
    });
}

}  // namespace llmkern::cuda
