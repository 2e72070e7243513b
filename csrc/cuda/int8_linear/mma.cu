#include "cuda/int8_linear/int8_linear.h"
#include "cuda/linear/launch_mma.h"

namespace llmkern::cuda::kernels::mma {

void int8_linear(const CodesArgs& args, const Plan& plan) {
    launch_mma<Int8>("int8_linear: cuda.mma", args, int(args.linear.k), plan);
}

}  // namespace llmkern::cuda::kernels::mma
