#include "cuda/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cuda/linear/integer_tile.h"

namespace llmkern::cuda::kernels::mma {

void int8_dynamic_linear(const IntegerCodesArgs& args, const Plan& plan) {
    const int64_t k = args.codes.linear.k;
    launch_integer_tile<Int8Codes>("int8_dynamic_linear: cuda.mma", args, int(k), k, plan);
}

}  // namespace llmkern::cuda::kernels::mma
