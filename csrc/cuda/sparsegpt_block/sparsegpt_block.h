// SparseGPT on one block of columns: pruned by a mask or n of every m, kept values quantized or not.
#pragma once

#include "cuda/columns/columns.h"

namespace llmkern::cuda {

#define LLMKERN_KERNEL(kernel)                                                          \
    namespace kernels::kernel {                                                         \
    void sparsegpt_block(const ColumnArgs& args, const ColumnPlan& plan, void* stream); \
    }
#include "cuda/sparsegpt_block/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
