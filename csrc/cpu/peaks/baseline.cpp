// Vectors of 16 bytes, which every x86-64 and aarch64 has; multiplication and addition where there is no fused one.
#include <cstdint>

#define LLMKERN_NS baseline

namespace llmkern::baseline {
namespace {

constexpr int CHAINS = 10;
typedef float Floats __attribute__((vector_size(16)));

volatile float kept;

int64_t fp32(int64_t rounds) {
    const Floats scale = {0.5f, 0.25f, 0.125f, 0.0625f}, shift = {1, 2, 3, 4};
    Floats sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = shift * static_cast<float>(i);
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < CHAINS; ++i) sum[i] = sum[i] * scale + shift;
    for (int i = 0; i < CHAINS; ++i) kept = sum[i][0] + sum[i][3];
    return rounds * CHAINS * 2 * 4;
}

int64_t bf16(int64_t) { return 0; }
int64_t int8(int64_t) { return 0; }

}  // namespace
}  // namespace llmkern::baseline

#include "cpu/peaks/kernel.inl"
