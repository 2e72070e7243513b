// What the blocks of a cluster that divided K have at the same place of their shared memory, added up in a fixed order.
#pragma once

#include "cuda/common/instructions.h"

namespace llmkern::cuda {

constexpr int CLUSTER_BLOCKS = 8;  // at most

LLMKERN_DEVICE float of_bits(float, uint32_t bits) { return as_float(bits); }
LLMKERN_DEVICE int of_bits(int, uint32_t bits) { return int(bits); }

// Four neighbours, at a multiple of 16 bytes. Of all blocks at once: what is not asked for before the first answer
// would be waited for block by block. Those are the blocks first, first + STEP, and so on.
template <int STEP = 1, class V>
LLMKERN_DEVICE void cluster_sum(const V* mine, int splits, V (&sum)[4], int first = 0) {
    constexpr int MOST = CLUSTER_BLOCKS / STEP;
    const Words4* const at = reinterpret_cast<const Words4*>(mine);
    Words4 part[MOST];
    part[0] = splits == 1 ? *at : load_cluster(at, first);
#pragma unroll
    for (int rank = 1; rank < MOST; rank++)
        if (rank < splits) part[rank] = load_cluster(at, first + rank * STEP);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = of_bits(V(), part[0].w[i]);
#pragma unroll
    for (int rank = 1; rank < MOST; rank++)
        if (rank < splits)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += of_bits(V(), part[rank].w[i]);
}

}  // namespace llmkern::cuda
