// GPTQ on one block of columns: every kept value is quantized.
#pragma once

#include "cpu/columns/columns.h"

namespace llmkern {

#define LLMKERN_KERNEL(level)                \
    namespace level {                        \
    void gptq_block(const ColumnArgs& args); \
    }
#include "cpu/gptq_block/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
