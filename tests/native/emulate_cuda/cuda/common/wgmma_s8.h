// In the place of csrc/cuda/common/wgmma_s8.h.
#pragma once

#include "cuda/common/wgmma.h"

namespace llmkern::cuda {

template <int TOKENS>
void run_wgmma_s8(const emulated::AsyncProduct* const* threads) {
    static int left[64][32], right[TOKENS][32];
    const auto byte_of = [](uint64_t descriptor, int row, int k) {
        return int8_t(described(descriptor, row, k / 2) >> 8 * (k % 2));
    };
    for (int k = 0; k < 32; k++) {
        for (int row = 0; row < 64; row++) {
            // Of registers, lane 4g + c has columns 4c to 4c + 3 (and 16 more) of row g (and 8 more) of its warp's
            // rows.
            const int from = row / 16 * 32 + row % 8 * 4 + k % 16 / 4, at = row % 16 / 8 + k / 16 * 2;
            const uint32_t* const a = static_cast<const uint32_t*>(threads[from]->a);
            left[row][k] = a ? int8_t(a[at] >> 8 * (k % 4)) : byte_of(threads[0]->a_shared, row, k);
        }
        for (int n = 0; n < TOKENS; n++) right[n][k] = byte_of(threads[0]->b_shared, n, k);
    }
    for (int thread = 0; thread < 128; thread++)
        for (int t = 0; t < TOKENS / 8; t++)
            for (int i = 0; i < 4; i++) {
                const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8, column = 8 * t + thread % 4 * 2 + i % 2;
                int& sum = static_cast<int*>(threads[thread]->d)[4 * t + i];
                for (int k = 0; k < 32; k++) sum += left[row][k] * right[column][k];
            }
}

template <int TOKENS>
void wgmma_s8(int (&d)[TOKENS / 8][4], uint64_t a, uint64_t b) {
    issue({d, nullptr, a, b, run_wgmma_s8<TOKENS>}, TOKENS);
}
template <int TOKENS>
void wgmma_s8(int (&d)[TOKENS / 8][4], const uint32_t (&a)[4], uint64_t b) {
    issue({d, a, 0, b, run_wgmma_s8<TOKENS>}, TOKENS);
}

}  // namespace llmkern::cuda
