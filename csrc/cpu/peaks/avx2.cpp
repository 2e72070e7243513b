// FMA, and int8 by vpmaddubsw: two products and their sum in 16 bits, two of these in 32, one addition.
#include <immintrin.h>

#include <cstdint>

#define LLMKERN_NS avx2

namespace llmkern::avx2 {
namespace {

constexpr int CHAINS = 10;

volatile float kept;

int64_t fp32(int64_t rounds) {
    const __m256 scale = _mm256_set1_ps(0.5f), shift = _mm256_set1_ps(1);
    __m256 sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < CHAINS; ++i) sum[i] = _mm256_fmadd_ps(sum[i], scale, shift);
    for (int i = 0; i < CHAINS; ++i) kept = _mm256_cvtss_f32(sum[i]);
    return rounds * CHAINS * 2 * 8;
}

int64_t bf16(int64_t) { return 0; }

int64_t int8(int64_t rounds) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_set1_epi8(3), sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm256_set1_epi32(i);
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < CHAINS; ++i) {
            const __m256i pairs = _mm256_maddubs_epi16(a, sum[i]);
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones));
        }
    }
    for (int i = 0; i < CHAINS; ++i) kept = static_cast<float>(_mm256_extract_epi32(sum[i], 0));
    return rounds * CHAINS * 2 * 32;
}

}  // namespace
}  // namespace llmkern::avx2

#include "cpu/peaks/kernel.inl"
