// The column updates of one block of columns, which gptq_block and sparsegpt_block share.
#pragma once

#include <cstdint>

namespace llmkern::cuda {

constexpr int MAX_COLUMNS = 128;   // of a block; the Python side divides wider ones
constexpr int MAX_GROUP = 64;      // columns of an n:m group
constexpr int MAX_LAYERS = 65535;  // in one launch: blocks along y

// Column by column: choose q from the compensated value, feed w - q to the columns after it.
// A kept value is wc, or with bits the nearest grid value to it; a pruned one is 0.
// Layers of one shape lie one after the other without gaps, so that row r of layer l is row l * n + r of all.
struct ColumnArgs {
    const float* w;         // [layers, n, b]
    const float* wc;        // [layers, n, b] w with the feedback of all columns before the block
    const float* v;         // [layers, b, b] unit upper triangular; what is below the diagonal is not read as such
    const float* diagonal;  // [layers, b] weight of a column in the n:m score; null unless prune_m
    const uint8_t* mask;    // [layers, n, b] 1 = kept, 0 = pruned, or null
    const float* scales;    // [layers, n, groups], null unless bits
    const int8_t* zeros;    // [layers, n, groups], or null for all 0
    const int32_t* group;   // [b] each column's group in every layer, null unless bits
    float* q;               // [layers, n, b] out
    uint8_t* keep;          // [layers, n, b] out, or null
    int64_t layers, n, groups;
    int b;
    int prune_n, prune_m;  // the prune_n least of every prune_m columns go; prune_m = 0 where a mask or nothing prunes
    int bits;              // 0: not quantized
    bool aligned;          // every row of w, wc, v, q starts at a multiple of 16 bytes, of mask and keep at one of 4
};

enum class Prune {
    GIVEN,  // by the mask, or nothing
    QUADS,  // n of every 4 columns
    GROUPS  // n of every m columns, any m
};

// `lanes` of a warp share a row, each lane has a part of `rows` rows; `warps` in a block.
struct ColumnPlan {
    int lanes, rows, warps;
};

// Runs the instance of columns_kernel for these sizes. One file per PRUNE compiles its instances.
template <Prune PRUNE, bool QUANTIZED>
void launch_columns(const char* name, ColumnArgs args, const ColumnPlan& plan, void* stream);

}  // namespace llmkern::cuda
