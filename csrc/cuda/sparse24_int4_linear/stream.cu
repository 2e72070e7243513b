#include "cuda/sparse/launch_stream.h"
#include "cuda/sparse24_int4_linear/sparse24_int4_linear.h"

namespace llmkern::cuda::kernels::stream {

void sparse24_int4_linear(const KeptArgs& args, const Plan& plan) {
    const int row_bytes = int(((args.linear.k + 3) / 4 * 2 + 7) / 8 * 4);
    launch_sparse_stream<KeptInt4>("sparse24_int4_linear: cuda.stream", args, row_bytes, plan);
}

}  // namespace llmkern::cuda::kernels::stream
