// What the ops over 2:4 weights get, all in GPU memory.
#pragma once

#include "cuda/linear/linear.h"

namespace llmkern::cuda {

// Sparse24Weight or Sparse24Int4Weight; q = ceil(k / 4) quads in a row.
struct KeptArgs {
    LinearArgs linear;
    const void* values;        // [n, 2q]; int4: [n, 4 * ceil(2q / 8)] bytes
    DType values_dtype;        // x's, or I8; of no meaning for int4
    const uint8_t* positions;  // [n, ceil(q / 2)]
    const void* scales;        // [n, groups] or null
    DType scales_dtype;
    int64_t group_size;  // in columns
};

}  // namespace llmkern::cuda
