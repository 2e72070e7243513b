// int8_linear with each row of x quantized to int8 first; integer sums. Same arguments as int8_linear.
#pragma once

#include "cpu/int8_linear/int8_linear.h"

namespace llmkern {

#define LLMKERN_KERNEL(level)                             \
    namespace level {                                     \
    void int8_dynamic_linear(const Int8LinearArgs& args); \
    }
#include "cpu/int8_dynamic_linear/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
