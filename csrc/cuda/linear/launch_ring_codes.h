// From an op's arguments to one of the instances of ring_kernel for int4 or int8 weights.
#pragma once

#include "cuda/linear/launch_ring.h"
#include "cuda/linear/ring_codes.h"

namespace llmkern::cuda {

template <class Format, class T, RingScales SCALES, bool ZEROS>
void launch_ring_codes(const char* name, const LinearArgs& l, const RingArgs& to, const TensorMap& codes,
                       const Plan& plan) {
    if (plan.token_tiles == 1)
        return launch_ring<RingCodes<Format, T, 1, SCALES, ZEROS>, T, 1>(name, l, to, codes, codes, plan);
    if (plan.token_tiles == 2)
        return launch_ring<RingCodes<Format, T, 2, SCALES, ZEROS>, T, 2>(name, l, to, codes, codes, plan);
    no_instance(name, plan);
}
template <class Format, class T, RingScales SCALES>
void launch_ring_codes(const char* name, const LinearArgs& l, const RingArgs& to, const TensorMap& codes,
                       const Plan& plan) {
    if (to.zeros) return launch_ring_codes<Format, T, SCALES, true>(name, l, to, codes, plan);
    launch_ring_codes<Format, T, SCALES, false>(name, l, to, codes, plan);
}

template <class Format>
void launch_ring_codes(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const LinearArgs& l = args.linear;
    const int groups = groups_of(l.k, args.group_size);
    check_group_multiple(name, groups, args.group_size, Format::LANE_COLUMNS);
    if (l.n * groups > INT32_MAX)  // the kernel counts scales in 32 bits
        throw std::runtime_error(std::string(name) + ": more than 2^31 scales");
    if (row_bytes % 16 || l.k % 8 || !aligned_to(l.x, 16) || !aligned_to(args.codes, 16))
        throw std::runtime_error(std::string(name) + ": rows or pointers are not at multiples of 16 bytes");
    // Words of scales and zeros are read whole.
    const int64_t entries = l.n * groups;
    if ((args.scales_dtype != DType::F32 && entries % 2) || (args.zeros && entries % 4) ||
        !aligned_to(args.scales, 4) || !aligned_to(args.zeros, 4))
        throw std::runtime_error(std::string(name) + ": scales or zeros are no whole words");
    RingArgs to{};
    to.x = l.x;
    to.scales = args.scales, to.scales_dtype = args.scales_dtype, to.zeros = args.zeros;
    to.groups = groups, to.group_size = Divisor::of(uint32_t(args.group_size));
    to.out = {l.bias, l.bias_dtype, l.y, l.m, l.n};
    const TensorMap codes = tensor_map(name, args.codes, row_bytes, l.n, row_bytes, 64, 32);
    by_type(name, l.x_dtype, [&](auto type) {
        using T = decltype(type);
        if (groups == 1) return launch_ring_codes<Format, T, RingScales::ROWS>(name, l, to, codes, plan);
        if (args.group_size % (4 * Format::LANE_COLUMNS) == 0)
            return launch_ring_codes<Format, T, RingScales::SUMS>(name, l, to, codes, plan);
        launch_ring_codes<Format, T, RingScales::WEIGHTS>(name, l, to, codes, plan);
    });
}

}  // namespace llmkern::cuda
