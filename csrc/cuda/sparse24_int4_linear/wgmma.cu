#include "cuda/sparse/launch_wgmma.h"
#include "cuda/sparse24_int4_linear/sparse24_int4_linear.h"

namespace llmkern::cuda::kernels::wgmma {

void sparse24_int4_linear(const KeptArgs& args, const Plan& plan) {
    const int row_bytes = int(((args.linear.k + 3) / 4 * 2 + 7) / 8 * 4);
    launch_sparse_wgmma<KeptInt4>("sparse24_int4_linear: cuda.wgmma", args, row_bytes, plan);
}

}  // namespace llmkern::cuda::kernels::wgmma
