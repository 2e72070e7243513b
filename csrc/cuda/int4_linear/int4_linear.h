// y = x @ wᵀ + bias, w[n, k] = (u[n, k] - 8 - zeros[n, g]) * scales[n, g], g = k / group_size.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

#define LLMKERN_KERNEL(kernel)                                 \
    namespace kernel {                                         \
    void int4_linear(const CodesArgs& args, const Plan& plan); \
    }
#include "cuda/int4_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
