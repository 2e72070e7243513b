#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/integer_nibbles.h"

namespace llmkern::cuda::kernels::wgmma {

void int4_linear_int8(const IntegerCodesArgs& args, const Plan& plan) {
    launch_integer_nibbles("int4_linear: cuda.wgmma_int8", args, plan);
}

}  // namespace llmkern::cuda::kernels::wgmma
