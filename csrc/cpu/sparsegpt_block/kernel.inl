#include "cpu/sparsegpt_block/sparsegpt_block.h"

#include "cpu/columns/columns.inl"

namespace llmkern::LLMKERN_NS {

void sparsegpt_block(const ColumnArgs& args) { run_columns(args); }

}  // namespace llmkern::LLMKERN_NS
