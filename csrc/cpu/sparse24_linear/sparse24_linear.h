// y = x @ wᵀ + bias where w keeps two of every four columns: values, and a nibble of positions per four columns.
#pragma once

#include "cpu/linear/linear.h"

namespace llmkern {

struct Sparse24LinearArgs {
    LinearArgs linear;
    const void* values;  // [n, 2 ceil(k / 4)]
    DType values_dtype;
    const uint8_t* positions;  // [n, ceil(k / 8)]
    const void* scales;        // [n, groups] with int8 values, else null
    DType scales_dtype;
    int64_t group_size;  // of dense columns; a multiple of 4, or one group per row
};

#define LLMKERN_KERNEL(level)                             \
    namespace level {                                     \
    void sparse24_linear(const Sparse24LinearArgs& args); \
    }
#include "cpu/sparse24_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
