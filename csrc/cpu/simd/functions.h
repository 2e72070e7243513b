// exp, log1p and tanh of vectors, for kernels that include it after their level's header. Polynomials were fitted to
// the least relative error; exp is within 1.1 units in the last place over its range, the others within 3.
#pragma once

#include "cpu/simd/simd.h"

namespace llmkern::LLMKERN_NS {

// e^x for x <= 88; 0 below -87, where it would be subnormal. A NaN stays one.
LLMKERN_INLINE F32 exp(F32 x) {
    const F32 n = round_even(x * set1(1.44269504f));
    F32 r = fma(n, set1(-0.693145752f), x);  // ln 2 in two parts, the first exact in products with n
    r = fma(n, set1(-1.42860677e-6f), r);
    F32 p = set1(1.381453789e-3f);
    p = fma(p, r, set1(8.36874532e-3f));
    p = fma(p, r, set1(4.1668390831e-2f));
    p = fma(p, r, set1(1.66665203968e-1f));
    p = fma(p, r, set1(4.99999934319e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return select(x < set1(-87.0f), zero(), scale2(p, n));
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(y / (2 + y)).
LLMKERN_INLINE F32 log1p(F32 y) {
    const F32 z = y / (y + set1(2.0f)), u = z * z;
    F32 p = set1(2.81783260148e-1f);
    p = fma(p, u, set1(2.79606047314e-1f));
    p = fma(p, u, set1(4.00249101447e-1f));
    p = fma(p, u, set1(6.6666314685e-1f));
    return z * fma(p, u, set1(2.0f));
}

LLMKERN_INLINE F32 tanh(F32 x) {
    const F32 size = abs(x), u = x * x;
    F32 p = set1(1.8669224614e-2f);
    p = fma(p, u, set1(-5.3535227217e-2f));
    p = fma(p, u, set1(1.3330898076e-1f));
    p = fma(p, u, set1(-3.33332850235e-1f));
    const F32 small = fma(x * u, p, x);
    const F32 e = exp(size * set1(-2.0f));
    const F32 large = (set1(1.0f) - e) / (set1(1.0f) + e);
    return select(size < set1(0.4f), small, select(x < zero(), zero() - large, large));
}

}  // namespace llmkern::LLMKERN_NS
