#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/launch_mma.h"

namespace llmkern::cuda::kernels::mma {

void int4_linear(const CodesArgs& args, const Plan& plan) {
    launch_mma<Int4>("int4_linear: cuda.mma", args, int((args.linear.k + 7) / 8 * 4), plan);
}

}  // namespace llmkern::cuda::kernels::mma
