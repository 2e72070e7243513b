// FMA and vpdpbusd on 64 bytes.
#include <immintrin.h>

#include <cstdint>

#define LLMKERN_NS avx512_vnni

namespace llmkern::avx512_vnni {
namespace {

constexpr int CHAINS = 14;

volatile float kept;

int64_t fp32(int64_t rounds) {
    const __m512 scale = _mm512_set1_ps(0.5f), shift = _mm512_set1_ps(1);
    __m512 sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_fmadd_ps(sum[i], scale, shift);
    for (int i = 0; i < CHAINS; ++i) kept = _mm512_cvtss_f32(sum[i]);
    return rounds * CHAINS * 2 * 16;
}

int64_t bf16(int64_t) { return 0; }

int64_t int8(int64_t rounds) {
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    __m512i sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_set1_epi32(i);
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    for (int i = 0; i < CHAINS; ++i) kept = static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(sum[i])));
    return rounds * CHAINS * 2 * 64;
}

}  // namespace
}  // namespace llmkern::avx512_vnni

#include "cpu/peaks/kernel.inl"
