// The column updates of one block of columns, which gptq_block and sparsegpt_block share.
#pragma once

#include <cstdint>

namespace llmkern {

// Column by column: choose q from the compensated value, feed w - q to the columns after it.
// A kept value is wc, or with bits the nearest grid value to it; a pruned one is 0.
struct ColumnArgs {
    const float* w;         // [n, b]
    const float* wc;        // [n, b] w with the feedback of all columns before the block
    const float* v;         // [b, b] unit upper triangular
    const float* diagonal;  // [b] weight of a column in the n:m score; null unless prune_m
    const bool* mask;       // [n, b] true = kept, or null
    const float* scales;    // [n, groups], null unless bits
    const int8_t* zeros;    // [n, groups], or null for all 0
    const int32_t* group;   // [b] each column's group, null unless bits
    float* q;               // [n, b] out
    bool* keep;             // [n, b] out, or null
    int64_t n, b, groups;
    int prune_n, prune_m;  // the prune_n least of every prune_m columns go; prune_m = 0 where a mask or nothing prunes
    int bits;              // 0: not quantized
    int threads;
};

}  // namespace llmkern
