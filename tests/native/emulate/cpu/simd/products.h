// Takes the place of csrc/cpu/simd/products.h, which is assembly. See ../../immintrin.h.
#pragma once

#include <immintrin.h>

#include "cpu/simd/simd.h"

namespace llmkern::LLMKERN_NS {

LLMKERN_INLINE __m512i add_products(__m512i sum, __m512i u, __m512i s) { return _mm512_dpbusd_epi32(sum, u, s); }
LLMKERN_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, a, b); }
LLMKERN_INLINE __m512 add_pairs_at(__m512 sum, __m512i a, const void* b) {
    return _mm512_dpbf16_ps(sum, a, _mm512_load_si512(b));
}
LLMKERN_INLINE __m512i load_dword(const int32_t* p) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(*p)); }
LLMKERN_INLINE __m512i in_register(__m512i values) { return values; }

}  // namespace llmkern::LLMKERN_NS
