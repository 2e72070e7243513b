#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/integer_tile.h"

namespace llmkern::cuda::kernels::mma {

void int4_linear_int8(const IntegerCodesArgs& args, const Plan& plan) {
    const int row_bytes = int((args.codes.linear.k + 7) / 8 * 4);
    launch_integer_tile<Int4Codes>("int4_linear: cuda.mma_int8", args, row_bytes, args.codes.group_size, plan);
}

}  // namespace llmkern::cuda::kernels::mma
