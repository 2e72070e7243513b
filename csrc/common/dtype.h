// Element types as the Python side numbers them (DTYPE_CODES in python/llmkern/ops/_linear.py).
#pragma once

namespace llmkern {

enum class DType : int { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };

}  // namespace llmkern
