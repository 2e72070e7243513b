// SparseGPT on one block of columns: pruned by a mask or n of every m, kept values quantized or not.
#pragma once

#include "cpu/columns/columns.h"

namespace llmkern {

#define LLMKERN_KERNEL(level)                     \
    namespace level {                             \
    void sparsegpt_block(const ColumnArgs& args); \
    }
#include "cpu/sparsegpt_block/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
