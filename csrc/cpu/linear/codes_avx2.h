// Integer codes for codes.inl.
#pragma once

#include "cpu/simd/avx2.h"

#define LLMKERN_CODE_STREAM

namespace llmkern::avx2 {

// 32 bytes as dwords of eight columns side by side. Nibble v of all dwords, left where it stands, is u * 16^v, which an
// fp32 number holds exactly; the last one would be negative and is shifted down.
struct NibbleCodes {
    static constexpr int BYTES = 32, COLUMNS = 64, VECTORS = 8, OFFSET = 8;
    static LLMKERN_INLINE_MEMBER F32 lanes(const float* x, int v) {
        return {_mm256_i32gather_ps(x + v, _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56), 4)};
    }
    static constexpr float factor(int v) { return v == 7 ? 1.0f : 1.0f / static_cast<float>(1 << 4 * v); }

    struct Raw {
        __m256i dwords;
    };
    static LLMKERN_INLINE_MEMBER Raw load(const uint8_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
    }
    static LLMKERN_INLINE_MEMBER F32 vector(const Raw& raw, int v) {
        const __m256i code =
            v == 7 ? _mm256_srli_epi32(raw.dwords, 28) : _mm256_and_si256(raw.dwords, _mm256_set1_epi32(15 << 4 * v));
        return {_mm256_cvtepi32_ps(code)};
    }
};

struct ByteCodes {
    static constexpr int BYTES = 32, COLUMNS = 32, VECTORS = 4, OFFSET = 0;
    static LLMKERN_INLINE_MEMBER F32 lanes(const float* x, int v) { return avx2::load(x + v * F32::WIDTH); }
    static constexpr float factor(int) { return 1; }

    struct Raw {
        const uint8_t* at;
    };
    static LLMKERN_INLINE_MEMBER Raw load(const uint8_t* p) { return {p}; }
    static LLMKERN_INLINE_MEMBER F32 vector(const Raw& raw, int v) {
        return load_i8(reinterpret_cast<const int8_t*>(raw.at) + v * F32::WIDTH);
    }
};

}  // namespace llmkern::avx2
