#include "cuda/sparse/launch_tile.h"
#include "cuda/sparse24_int4_linear/sparse24_int4_linear.h"

namespace llmkern::cuda::kernels::mma {

void sparse24_int4_linear(const KeptArgs& args, const Plan& plan) {
    const int row_bytes = int(((args.linear.k + 3) / 4 * 2 + 7) / 8 * 4);
    launch_sparse_tile<KeptInt4>("sparse24_int4_linear: cuda.mma", args, row_bytes, plan);
}

}  // namespace llmkern::cuda::kernels::mma
