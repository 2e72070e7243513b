// y = x @ wᵀ + bias, w unstructured sparse: kept values in x's type, or int8 times scales[n, g], g = k / group_size.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

// BitmaskWeight, all in GPU memory.
struct MaskArgs {
    LinearArgs linear;
    const void* values;          // [nnz]
    DType values_dtype;          // x's, or I8
    const uint8_t* bits;         // [n, ceil(k / 8)]
    const int64_t* row_offsets;  // [n + 1]
    const void* scales;          // [n, groups] or null
    DType scales_dtype;
    int64_t group_size;
};

// In a namespace of their own, since `mma` is an instruction too.
#define LLMKERN_KERNEL(kernel)                                   \
    namespace kernels::kernel {                                  \
    void bitmask_linear(const MaskArgs& args, const Plan& plan); \
    }
#include "cuda/bitmask_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
