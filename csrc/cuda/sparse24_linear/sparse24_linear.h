// y = x @ wᵀ + bias, w 2:4 sparse with values in x's type, or int8 values times scales[n, g], g = k / group_size.
#pragma once

#include "cuda/sparse/sparse.h"

namespace llmkern::cuda {

// In a namespace of their own, since `mma` is an instruction too.
#define LLMKERN_KERNEL(kernel)                                    \
    namespace kernels::kernel {                                   \
    void sparse24_linear(const KeptArgs& args, const Plan& plan); \
    }
#include "cuda/sparse24_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
