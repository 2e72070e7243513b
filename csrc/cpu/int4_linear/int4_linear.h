// y = x @ wᵀ + bias, w[n, k] = (u[n, k] - 8 - zeros[n, g]) * scales[n, g], g = k / group_size.
#pragma once

#include "cpu/linear/linear.h"

namespace llmkern {

struct Int4LinearArgs {
    LinearArgs linear;
    const uint8_t* nibbles;  // [n, 4 * ceil(k / 8)]: the words' bytes; the low nibble of a byte is the even column
    const void* scales;      // [n, groups]
    DType scales_dtype;
    const int8_t* zeros;  // [n, groups] or null
    int64_t group_size;
    bool int8_activations;  // x quantized to int8 per row and group first, integer sums
};

#define LLMKERN_KERNEL(level)                     \
    namespace level {                             \
    void int4_linear(const Int4LinearArgs& args); \
    }
#include "cpu/int4_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
