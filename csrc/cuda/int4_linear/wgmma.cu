#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/launch_wgmma.h"

namespace llmkern::cuda::kernels::wgmma {

void int4_linear(const CodesArgs& args, const Plan& plan) {
    launch_wgmma<Int4>("int4_linear: cuda.wgmma", args, int((args.linear.k + 7) / 8 * 4), plan);
}

}  // namespace llmkern::cuda::kernels::wgmma
