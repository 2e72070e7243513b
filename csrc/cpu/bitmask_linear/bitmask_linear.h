// y = x @ wᵀ + bias where w keeps the columns whose bit is set: the kept values of all rows, one after the other.
#pragma once

#include "cpu/linear/linear.h"

namespace llmkern {

struct BitmaskLinearArgs {
    LinearArgs linear;
    const void* values;  // [row_offsets[n]]
    DType values_dtype;
    const uint8_t* bits;         // [n, ceil(k / 8)], the least significant bit first
    const int64_t* row_offsets;  // [n + 1]
    const void* scales;          // [n, groups] with int8 values, else null
    DType scales_dtype;
    int64_t group_size;  // of dense columns
};

#define LLMKERN_KERNEL(level)                           \
    namespace level {                                   \
    void bitmask_linear(const BitmaskLinearArgs& args); \
    }
#include "cpu/bitmask_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
