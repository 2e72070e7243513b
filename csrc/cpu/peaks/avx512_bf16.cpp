// vdpbf16ps on 64 bytes. Everything else is that of avx512_vnni.
#include <immintrin.h>

#include <cstdint>

#define LLMKERN_NS avx512_bf16

namespace llmkern::avx512_bf16 {
namespace {

constexpr int CHAINS = 14;

volatile float kept;

int64_t fp32(int64_t) { return 0; }

int64_t bf16(int64_t rounds) {
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
    __m512 sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, a);
    for (int i = 0; i < CHAINS; ++i) kept = _mm512_cvtss_f32(sum[i]);
    return rounds * CHAINS * 2 * 32;
}

int64_t int8(int64_t) { return 0; }

}  // namespace
}  // namespace llmkern::avx512_bf16

#include "cpu/peaks/kernel.inl"
