// Per row and group, the clipped scale (and zero point) whose rounding error, weighted per column, is least.
#pragma once

#include <cstdint>

namespace llmkern {

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
    int threads;
};

#define LLMKERN_KERNEL(level)                       \
    namespace level {                               \
    void scale_search(const ScaleSearchArgs& args); \
    }
#include "cpu/scale_search/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
