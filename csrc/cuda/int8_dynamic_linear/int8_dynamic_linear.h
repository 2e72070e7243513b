// y = x @ wᵀ + bias as int8_linear, with each row of x quantized to int8 first; int32 sums.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

// In a namespace of their own, since `mma` is an instruction too.
#define LLMKERN_KERNEL(kernel)                                                \
    namespace kernels::kernel {                                               \
    void int8_dynamic_linear(const IntegerCodesArgs& args, const Plan& plan); \
    }
#include "cuda/int8_dynamic_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
