// smmla: 2 x 8 by 8 x 2 bytes. Everything else is that of neon_dotprod.
#include <arm_neon.h>

#include <cstdint>

#define LLMKERN_NS neon_i8mm

namespace llmkern::neon_i8mm {
namespace {

constexpr int CHAINS = 24;

volatile float kept;

int64_t fp32(int64_t) { return 0; }
int64_t bf16(int64_t) { return 0; }

int64_t int8(int64_t rounds) {
    const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
    int32x4_t sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = vdupq_n_s32(i);
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < CHAINS; ++i) sum[i] = vmmlaq_s32(sum[i], a, b);
    for (int i = 0; i < CHAINS; ++i) kept = static_cast<float>(vgetq_lane_s32(sum[i], 0));
    return rounds * CHAINS * 2 * 32;
}

}  // namespace
}  // namespace llmkern::neon_i8mm

#include "cpu/peaks/kernel.inl"
