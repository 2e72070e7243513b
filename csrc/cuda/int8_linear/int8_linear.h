// y = x @ wᵀ + bias, w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k / group_size.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

// In a namespace of their own, since `mma` is an instruction too.
#define LLMKERN_KERNEL(kernel)                                 \
    namespace kernels::kernel {                                \
    void int8_linear(const CodesArgs& args, const Plan& plan); \
    }
#include "cuda/int8_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
