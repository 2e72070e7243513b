// y = x @ wᵀ + bias where w keeps two of every four columns as int4 codes with scales.
#pragma once

#include "cpu/linear/linear.h"

namespace llmkern {

struct Sparse24Int4LinearArgs {
    LinearArgs linear;
    const int32_t* words;      // [n, ceil(2 ceil(k / 4) / 8)]
    const uint8_t* positions;  // [n, ceil(k / 8)]
    const void* scales;        // [n, groups]
    DType scales_dtype;
    int64_t group_size;  // of dense columns; a multiple of 4, or one group per row
};

#define LLMKERN_KERNEL(level)                                      \
    namespace level {                                              \
    void sparse24_int4_linear(const Sparse24Int4LinearArgs& args); \
    }
#include "cpu/sparse24_int4_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
