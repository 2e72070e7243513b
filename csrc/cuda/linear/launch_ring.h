// From an op's arguments to one of the instances of ring_kernel. The Python side (ops/_cuda.py `ring_plan`) chooses the
// sizes and has checked the tensors.
#pragma once

#include "cuda/linear/launch.h"
#include "cuda/linear/ring_codes.h"

namespace llmkern::cuda {

inline int upto(int64_t value, int multiple) { return int((value + multiple - 1) / multiple * multiple); }

inline int log2_of(const char* name, int value) {
    int shift = 0;
    while (1 << shift < value) shift++;
    if (1 << shift != value) throw std::runtime_error(std::string(name) + ": no power of two: " + std::to_string(value));
    return shift;
}

// plan.row_tiles: groups of warps in a block, each with tiles of its own.
template <class Weights, class T, int TOKEN_TILES>
void launch_ring(const char* name, const LinearArgs& l, RingArgs to, const TensorMap& codes, const Plan& plan) {
    constexpr int WARPS = RING_WARPS, DEPTH = RING_DEPTH<TOKEN_TILES>;
    const int64_t tiles = (l.n + 16 * RING_TILES - 1) / (16 * RING_TILES);
    to.k = int(l.k), to.chunks = int((l.k + Weights::CHUNK - 1) / Weights::CHUNK);
    if (plan.row_tiles < 1 || plan.row_tiles > WARPS || plan.splits > to.chunks ||
        (plan.splits > 1 && plan.row_tiles > 1))
        throw std::runtime_error(std::string(name) + ": no such groups of warps");
    to.split_shift = log2_of(name, plan.splits), to.group_shift = log2_of(name, WARPS / plan.row_tiles);
    to.part = (to.chunks + plan.splits - 1) / plan.splits;
    // A cluster is within a GPC, whose number of multiprocessors is no multiple of 4.
    const int sms = multiprocessors(name), most = plan.splits <= 2 ? sms / plan.splits : plan.splits == 4 ? sms * 32 / 132 : sms * 14 / 132;
    to.blocks = int(tiles < most ? tiles : most < 1 ? 1 : most);
    to.tokens = int(l.m < 8 * TOKEN_TILES ? l.m : 8 * TOKEN_TILES);
    to.x_pitch = upto(to.part * Weights::CHUNK * 2, 64) + 32;
    // Of the warp with the most and of the one with the fewest chunks.
    const int group_warps = 1 << to.group_shift, wide = (to.part + group_warps - 1) / group_warps;
    const int narrow = to.chunks / plan.splits / group_warps;
    to.small_buffers = 1 + (narrow ? (DEPTH + narrow - 1) / narrow : DEPTH);
    const int64_t small_groups = Weights::small_groups(to, wide);
    if (small_groups) {
        const int size = to.scales_dtype == DType::F32 ? 4 : 2;
        to.small_units = Weights::units_fit(to, size);
        // An odd number of 16 bytes, and of words: eight rows are in different banks.
        if (Weights::SCALED) to.scale_pitch = upto(small_groups * size + (to.small_units ? 0 : 4), 16);
        if (to.scale_pitch && to.scale_pitch % 32 == 0) to.scale_pitch += 16;
        if (to.zeros) to.zero_pitch = (upto(small_groups + 3, 4) / 4 | 1) * 4;
        to.small_bytes = upto(32 * (to.scale_pitch + to.zero_pitch), 16);
    }
    Grid grid;
    grid.x = unsigned(to.blocks);
    grid.y = grid.cluster_y = unsigned(plan.splits);
    grid.z = unsigned((l.m + to.tokens - 1) / to.tokens);
    grid.threads = WARPS * 32;
    const int64_t rounds = plan.splits > 1 ? (tiles + to.blocks - 1) / to.blocks : 0;
    grid.shared_bytes = size_t(Ring<Weights, T, TOKEN_TILES>::bytes(to, rounds));
    grid.overlap = true;
    launch(name, ring_kernel<Weights, T, TOKEN_TILES>, grid, l.stream, to, codes);
}

template <class Format, class T, RingScales SCALES, bool ZEROS>
void launch_ring_codes(const char* name, const LinearArgs& l, const RingArgs& to, const TensorMap& codes,
                       const Plan& plan) {
    if (plan.token_tiles == 1) return launch_ring<RingCodes<Format, T, 1, SCALES, ZEROS>, T, 1>(name, l, to, codes, plan);
    if (plan.token_tiles == 2) return launch_ring<RingCodes<Format, T, 2, SCALES, ZEROS>, T, 2>(name, l, to, codes, plan);
    no_instance(name, plan);
}
template <class Format, class T, RingScales SCALES>
void launch_ring_codes(const char* name, const LinearArgs& l, const RingArgs& to, const TensorMap& codes,
                       const Plan& plan) {
    if (to.zeros) return launch_ring_codes<Format, T, SCALES, true>(name, l, to, codes, plan);
    launch_ring_codes<Format, T, SCALES, false>(name, l, to, codes, plan);
}

template <class Format>
void launch_ring(const char* name, const CodesArgs& args, int row_bytes, const Plan& plan) {
    const LinearArgs& l = args.linear;
    const int groups = groups_of(l.k, args.group_size);
    check_group_multiple(name, groups, args.group_size, Format::LANE_COLUMNS);
    if (l.n * groups > INT32_MAX)  // the kernel counts scales in 32 bits
        throw std::runtime_error(std::string(name) + ": more than 2^31 scales");
    if (row_bytes % 16 || l.k % 8 || !aligned_to(l.x, 16) || !aligned_to(args.codes, 16))
        throw std::runtime_error(std::string(name) + ": rows or pointers are not at multiples of 16 bytes");
    // Words of scales and zeros are read whole.
    const int64_t entries = l.n * groups;
    if ((args.scales_dtype != DType::F32 && entries % 2) || (args.zeros && entries % 4) || !aligned_to(args.scales, 4) ||
        !aligned_to(args.zeros, 4))
        throw std::runtime_error(std::string(name) + ": scales or zeros are no whole words");
    RingArgs to{};
    to.x = l.x;
    to.scales = args.scales, to.scales_dtype = args.scales_dtype, to.zeros = args.zeros;
    to.groups = groups, to.group_size = Divisor::of(uint32_t(args.group_size));
    to.out = {l.bias, l.bias_dtype, l.y, l.m, l.n};
    const TensorMap codes = tensor_map(name, args.codes, row_bytes, l.n, row_bytes, 64, 16 * RING_TILES);
    by_type(name, l.x_dtype, [&](auto type) {
        using T = decltype(type);
        if (groups == 1) return launch_ring_codes<Format, T, RingScales::ROWS>(name, l, to, codes, plan);
        if (args.group_size % (4 * Format::LANE_COLUMNS) == 0)
            return launch_ring_codes<Format, T, RingScales::SUMS>(name, l, to, codes, plan);
        launch_ring_codes<Format, T, RingScales::WEIGHTS>(name, l, to, codes, plan);
    });
}

}  // namespace llmkern::cuda
