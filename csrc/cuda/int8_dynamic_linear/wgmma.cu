#include "cuda/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cuda/linear/integer_wgmma.h"

namespace llmkern::cuda::kernels::wgmma {

void int8_dynamic_linear(const IntegerCodesArgs& args, const Plan& plan) {
    launch_integer_wgmma("int8_dynamic_linear: cuda.wgmma", args, plan);
}

}  // namespace llmkern::cuda::kernels::wgmma
