#include "cuda/gptq_block/gptq_block.h"

namespace llmkern::cuda::kernels::block {

void gptq_block(const ColumnArgs& args, const ColumnPlan& plan, void* stream) {
    launch_columns<Prune::GIVEN, true>("gptq_block: cuda.block", args, plan, stream);
}

}  // namespace llmkern::cuda::kernels::block
