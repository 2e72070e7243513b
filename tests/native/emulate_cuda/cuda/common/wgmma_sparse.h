// In the place of csrc/cuda/common/wgmma_sparse.h.
#pragma once

#include "cuda/common/wgmma.h"

namespace llmkern::cuda {

// Row of a warpgroup's a, quad of its eight: where the two kept columns are.
inline uint32_t nibble_of(const emulated::AsyncProduct* const* threads, int selector, int row, int quad) {
    const int lane = row % 8 * 4 + 2 * selector + quad / 4;
    const uint32_t positions = *threads[row / 16 * 32 + lane]->positions;
    const uint32_t nibble = positions >> (row % 16 / 8 * 16 + quad % 4 * 4) & 15;
    if ((nibble & 3) >= nibble >> 2) throw std::runtime_error("wgmma_sparse: positions out of order");
    return nibble;
}

template <class T, int TOKENS, int SELECTOR>
void run_wgmma_sparse(const emulated::AsyncProduct* const* threads) {
    static float left[64][32], right[TOKENS][32];
    for (int n = 0; n < TOKENS; n++)
        for (int k = 0; k < 32; k++) right[n][k] = to_float<T>(described(threads[0]->b_shared, n, k));
    std::memset(left, 0, sizeof left);
    for (int row = 0; row < 64; row++)
        for (int quad = 0; quad < 8; quad++) {
            // Lane 4g + c has quad c (and 4 more) of row g (and 8 more) of its warp's rows.
            const auto* from = threads[row / 16 * 32 + row % 8 * 4 + quad % 4];
            const uint32_t pair = static_cast<const uint32_t*>(from->a)[row % 16 / 8 + quad / 4 * 2];
            const uint32_t nibble = nibble_of(threads, SELECTOR, row, quad);
            left[row][4 * quad + (nibble & 3)] = to_float<T>(uint16_t(pair));
            left[row][4 * quad + (nibble >> 2)] = to_float<T>(uint16_t(pair >> 16));
        }
    for (int thread = 0; thread < 128; thread++)
        for (int t = 0; t < TOKENS / 8; t++)
            for (int i = 0; i < 4; i++) {
                const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8, column = 8 * t + thread % 4 * 2 + i % 2;
                float& sum = static_cast<float*>(threads[thread]->d)[4 * t + i];
                double exact = sum;
                for (int k = 0; k < 32; k++)
                    if (left[row][k] != 0) exact += double(left[row][k]) * right[column][k];
                sum = float(exact);
            }
}

template <class T, int TOKENS, int SELECTOR>
void wgmma_sparse(float (&d)[TOKENS / 8][4], const uint32_t (&a)[4], const uint32_t& positions, uint64_t b) {
    issue({d, a, 0, b, run_wgmma_sparse<T, TOKENS, SELECTOR>, &positions}, TOKENS, 32);
}

}  // namespace llmkern::cuda
