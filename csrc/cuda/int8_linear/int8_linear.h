// y = x @ wᵀ + bias, w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k / group_size.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

#define LLMKERN_KERNEL(kernel)                                 \
    namespace kernel {                                         \
    void int8_linear(const CodesArgs& args, const Plan& plan); \
    }
#include "cuda/int8_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
