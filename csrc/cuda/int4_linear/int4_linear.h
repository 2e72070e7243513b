// y = x @ wᵀ + bias, w[n, k] = (u[n, k] - 8 - zeros[n, g]) * scales[n, g], g = k / group_size.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

// In a namespace of their own, since `mma` is an instruction too.
#define LLMKERN_KERNEL(kernel)                                 \
    namespace kernels::kernel {                                \
    void int4_linear(const CodesArgs& args, const Plan& plan); \
    }
#include "cuda/int4_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
