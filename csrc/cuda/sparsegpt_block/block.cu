#include "cuda/sparsegpt_block/sparsegpt_block.h"

#include <type_traits>

namespace llmkern::cuda::kernels::block {

void sparsegpt_block(const ColumnArgs& args, const ColumnPlan& plan, void* stream) {
    constexpr const char* NAME = "sparsegpt_block: cuda.block";
    const auto start = [&](auto prune) {
        constexpr Prune PRUNE = decltype(prune)::value;
        args.bits ? launch_columns<PRUNE, true>(NAME, args, plan, stream)
                  : launch_columns<PRUNE, false>(NAME, args, plan, stream);
    };
    if (args.prune_m == 0) return start(std::integral_constant<Prune, Prune::GIVEN>());
    if (args.prune_m == 4) return start(std::integral_constant<Prune, Prune::QUADS>());
    start(std::integral_constant<Prune, Prune::GROUPS>());
}

}  // namespace llmkern::cuda::kernels::block
