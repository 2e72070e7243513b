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
        for (int row = 0; row < 64; row++) left[row][k] = byte_of(threads[0]->a_shared, row, k);
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

}  // namespace llmkern::cuda
