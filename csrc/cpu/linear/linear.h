// What every linear op gets besides its weight: y[m, n] = sum_k x[m, k] * w[n, k] + bias[n].
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmkern {

struct LinearArgs {
    const void* x;  // [m, k]
    DType x_dtype;
    const void* bias;  // [n] or null
    DType bias_dtype;
    void* y;  // [m, n] in x's dtype; every element is written
    int64_t m, n, k;
    int threads;
};

}  // namespace llmkern
