// Reading and writing values whose type is known at run time: scales, bias.
#pragma once

#include "common/dtype.h"
#include "cuda/common/instructions.h"

namespace llmkern::cuda {

// In two steps, so that a value can be on its way while others are used: its bits as they lie in memory, and the float
// that they are.
LLMKERN_DEVICE uint32_t load_bits(const void* values, int64_t at, DType dtype) {
    const bool four = dtype == DType::F32;
    return load_2_or_4(static_cast<const uint8_t*>(values) + at * (four ? 4 : 2), four);
}
LLMKERN_DEVICE float bits_to_float(uint32_t bits, DType dtype) {
    const float wide = as_float(bits << (dtype == DType::BF16 ? 16 : 0));  // no branch for what is not fp16
    return dtype == DType::F16 ? to_float<F16>(uint16_t(bits)) : wide;
}

LLMKERN_DEVICE float load_float(const void* values, int64_t at, DType dtype) {
    return bits_to_float(load_bits(values, at, dtype), dtype);
}

template <class V>
LLMKERN_DEVICE V smaller(V a, V b) {
    return a < b ? a : b;
}

// Eight columns of a row of x that has k of them; zeros beyond. ALIGNED: rows start at multiples of 16 bytes.
template <bool ALIGNED>
LLMKERN_DEVICE Words4 load_halves(const uint16_t* row, int column, int k) {
    if (ALIGNED) return column < k ? load_shared_use(row + column) : Words4{};
    Words4 v{};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (column + i < k) v.w[i / 2] |= uint32_t(row[column + i]) << i % 2 * 16;
    return v;
}

template <class T>
LLMKERN_DEVICE uint16_t to_bits(float value) {
    return uint16_t(pack2<T>(value, 0.0f));
}

}  // namespace llmkern::cuda
