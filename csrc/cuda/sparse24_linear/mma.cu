#include "cuda/sparse/launch_tile.h"
#include "cuda/sparse24_linear/sparse24_linear.h"

namespace llmkern::cuda::kernels::mma {

void sparse24_linear(const KeptArgs& args, const Plan& plan) {
    const char* const name = "sparse24_linear: cuda.mma";
    const int values = int((args.linear.k + 3) / 4 * 2);
    if (args.values_dtype == DType::I8) return launch_sparse_tile<KeptInt8>(name, args, values, plan);
    launch_sparse_tile<Kept16>(name, args, 2 * values, plan);
}

}  // namespace llmkern::cuda::kernels::mma
