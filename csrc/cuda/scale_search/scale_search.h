// Per row and group, the clipped scale (and zero point) whose rounding error, weighted per column, is least.
#pragma once

#include <cstdint>

namespace llmkern::cuda {

struct ScaleSearchArgs {
    const float* w;           // [n, k]
    const float* importance;  // [k]
    float* scales;            // [n, ceil(k / group_size)] out
    int8_t* zeros;            // [n, ceil(k / group_size)] out
    int64_t n, k, group_size;
    int bits;
    bool symmetric;
    int steps;        // clip ratios 1 - i (1 - smallest) / steps
    double smallest;  // of the ratios
    int blocks;       // to launch; each takes every blocks-th of its share of the groups
    void* stream;
};

#define LLMKERN_KERNEL(kernel)                      \
    namespace kernels::kernel {                     \
    void scale_search(const ScaleSearchArgs& args); \
    }
#include "cuda/scale_search/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern::cuda
