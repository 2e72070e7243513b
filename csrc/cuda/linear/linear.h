// What every linear op gets besides its weight: y[m, n] = sum_k x[m, k] * w[n, k] + bias[n], all in GPU memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmkern::cuda {

struct LinearArgs {
    const void* x;  // [m, k], bf16 or fp16
    DType x_dtype;
    const void* bias;  // [n] or null
    DType bias_dtype;
    void* y;  // [m, n] in x's dtype; every element is written
    int64_t m, n, k;
    void* stream;
};

// Int4Weight or Int8Weight.
struct CodesArgs {
    LinearArgs linear;
    const void* codes;   // int4: [n, 4 * ceil(k / 8)] bytes, int8: [n, k]
    const void* scales;  // [n, groups]
    DType scales_dtype;
    const int8_t* zeros;  // [n, groups] or null
    int64_t group_size;
};

// The same with x quantized to int8. `workspace`: where x's codes, scales and sums go, 16 bytes aligned
// (ops/_cuda.py `integer_workspace`); null where the kernel shall quantize x as it goes.
struct IntegerCodesArgs {
    CodesArgs codes;
    void* workspace;
};

// Sizes that the Python side chose (ops/_cuda.py): tiles of 16 rows of w and of 8 rows of x in a block, and the blocks
// of a cluster that divide K.
struct Plan {
    int row_tiles, token_tiles, splits;
};

}  // namespace llmkern::cuda
