// GPTQ on one block of columns: every kept value is quantized.
#pragma once

#include "cuda/columns/columns.h"

namespace llmkern::cuda {

#define LLMKERN_KERNEL(kernel)                                                     \
    namespace kernels::kernel {                                                    \
    void gptq_block(const ColumnArgs& args, const ColumnPlan& plan, void* stream); \
    }
#include "cuda/gptq_block/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
