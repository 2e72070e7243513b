#include "cpu/gptq_block/gptq_block.h"

#include "cpu/columns/columns.inl"

namespace llmkern::LLMKERN_NS {

void gptq_block(const ColumnArgs& args) { run_columns(args); }

}  // namespace llmkern::LLMKERN_NS
