// The launch of ring_kernel. The Python side (ops/_cuda_ring.py `plan`) chooses the sizes and has checked the tensors.
#pragma once

#include "cuda/linear/launch.h"
#include "cuda/linear/ring.h"

namespace llmkern::cuda {

inline int upto(int64_t value, int multiple) { return int((value + multiple - 1) / multiple * multiple); }

inline int log2_of(const char* name, int value) {
    int shift = 0;
    while (1 << shift < value) shift++;
    if (1 << shift != value)
        throw std::runtime_error(std::string(name) + ": no power of two: " + std::to_string(value));
    return shift;
}

// plan.row_tiles: groups of warps in a block, each with tiles of its own.
template <class Weights, class T, int TOKEN_TILES>
void launch_ring(const char* name, const LinearArgs& l, RingArgs to, const TensorMap& first, const TensorMap& second,
                 const Plan& plan) {
    constexpr int WARPS = RING_WARPS, DEPTH = RING_DEPTH<TOKEN_TILES>;
    const int64_t tiles = (l.n + 16 * Weights::TILES - 1) / (16 * Weights::TILES);
    to.k = int(l.k), to.chunks = int((l.k + Weights::CHUNK - 1) / Weights::CHUNK);
    if (plan.row_tiles < 1 || plan.row_tiles > WARPS || plan.splits > to.chunks ||
        (plan.splits > 1 && plan.row_tiles > 1))
        throw std::runtime_error(std::string(name) + ": no such groups of warps");
    to.split_shift = log2_of(name, plan.splits), to.group_shift = log2_of(name, WARPS / plan.row_tiles);
    to.part = (to.chunks + plan.splits - 1) / plan.splits;
    // A cluster is within a GPC, whose number of multiprocessors is no multiple of 4 (ops/_cuda_ring.py CLUSTERED).
    const int most = multiprocessors(name) * (plan.splits > 2 ? 120 : 132) / 132 / plan.splits;
    to.blocks = int(tiles < most ? tiles : most < 1 ? 1 : most);
    to.tokens = int(l.m < 8 * TOKEN_TILES ? l.m : 8 * TOKEN_TILES);
    to.x_pitch = upto(to.part * Weights::CHUNK * 2, 128) + 16;
    // Of the warp with the most and of the one with the fewest chunks.
    const int group_warps = 1 << to.group_shift, wide = (to.part + group_warps - 1) / group_warps;
    const int narrow = to.chunks / plan.splits / group_warps;
    to.small_buffers = 1 + (narrow ? (DEPTH + narrow - 1) / narrow : DEPTH);
    if (const int64_t groups = Weights::Small::groups_in(to, wide)) {
        const int size = to.scales_dtype == DType::F32 ? 4 : 2;
        to.small_units = Weights::Small::units_fit(to, size);
        // An odd number of 16 bytes, and of words: eight rows are in different banks.
        if (Weights::SCALED) to.scale_pitch = upto(groups * size + (to.small_units ? 0 : 4), 16);
        if (to.scale_pitch && to.scale_pitch % 32 == 0) to.scale_pitch += 16;
        if (to.zeros) to.zero_pitch = (upto(groups + 3, 4) / 4 | 1) * 4;
        to.small_bytes = 16 * Weights::TILES * (to.scale_pitch + to.zero_pitch);
    }
    Grid grid;
    grid.x = unsigned(to.blocks);
    grid.y = grid.cluster_y = unsigned(plan.splits);
    grid.z = unsigned((l.m + to.tokens - 1) / to.tokens);
    grid.threads = WARPS * 32;
    const int64_t rounds = plan.splits > 1 ? (tiles + to.blocks - 1) / to.blocks : 0;
    grid.shared_bytes = size_t(Ring<Weights, T, TOKEN_TILES>::bytes(to, rounds));
    grid.overlap = true;
    launch(name, ring_kernel<Weights, T, TOKEN_TILES>, grid, l.stream, to, first, second);
}

}  // namespace llmkern::cuda
