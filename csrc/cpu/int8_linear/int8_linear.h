// y = x @ wᵀ + bias, w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k / group_size.
#pragma once

#include "cpu/linear/linear.h"

namespace llmkern {

struct Int8LinearArgs {
    LinearArgs linear;
    const int8_t* codes;  // [n, k]
    const void* scales;   // [n, groups]
    DType scales_dtype;
    const int8_t* zeros;  // [n, groups] or null
    int64_t group_size;
};

#define LLMKERN_KERNEL(level)                     \
    namespace level {                             \
    void int8_linear(const Int8LinearArgs& args); \
    }
#include "cpu/int8_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
