#include "cuda/int8_linear/int8_linear.h"
#include "cuda/linear/launch_wgmma.h"

namespace llmkern::cuda::kernels::wgmma {

void int8_linear(const CodesArgs& args, const Plan& plan) {
    launch_wgmma<Int8>("int8_linear: cuda.wgmma", args, int(args.linear.k), plan);
}

}  // namespace llmkern::cuda::kernels::wgmma
