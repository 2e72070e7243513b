// Products that are added to sums, as assembly: GCC 12 copies the accumulator before and after the intrinsics, which
// doubles the instructions of an inner loop. And a register that the compiler shall not take for memory.
#pragma once

#include <immintrin.h>

#include "cpu/simd/simd.h"

namespace llmkern::LLMKERN_NS {

// Adds to each int32 lane of `sum` its four products u * s.
LLMKERN_INLINE __m512i add_products(__m512i sum, __m512i u, __m512i s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
}

// Adds to each fp32 lane of `sum` the two products of its pairs of bf16.
LLMKERN_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// The same for b in memory, aligned: the instruction reads it, so that it takes no register.
LLMKERN_INLINE __m512 add_pairs_at(__m512 sum, __m512i a, const void* b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*static_cast<const __m512i*>(b)));
    return sum;
}

// *p in lane 0, zeros in the others. The intrinsics cost a second instruction, which widens what is wide already.
LLMKERN_INLINE __m512i load_dword(const int32_t* p) {
    __m512i values;
    __asm__("vmovd %1, %x0" : "=v"(values) : "m"(*p));
    return values;
}

// The same values: what comes next must take them from a register.
LLMKERN_INLINE __m512i in_register(__m512i values) {
    __asm__("" : "+v"(values));
    return values;
}

}  // namespace llmkern::LLMKERN_NS
