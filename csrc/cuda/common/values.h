// Reading and writing values whose type is known at run time: scales, bias.
#pragma once

#include "common/dtype.h"
#include "cuda/common/instructions.h"

namespace llmkern::cuda {

LLMKERN_DEVICE float load_float(const void* values, int64_t at, DType dtype) {
    if (dtype == DType::F32) return static_cast<const float*>(values)[at];
    const uint16_t bits = static_cast<const uint16_t*>(values)[at];
    return dtype == DType::BF16 ? to_float<Bf16>(bits) : to_float<F16>(bits);
}

template <class V>
LLMKERN_DEVICE V smaller(V a, V b) {
    return a < b ? a : b;
}

template <class T>
LLMKERN_DEVICE uint16_t to_bits(float value) {
    return uint16_t(pack2<T>(value, 0.0f));
}

}  // namespace llmkern::cuda
