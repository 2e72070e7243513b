#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/launch_ring_codes.h"

namespace llmkern::cuda::kernels::ring {

void int4_linear(const CodesArgs& args, const Plan& plan) {
    launch_ring_codes<Int4>("int4_linear: cuda.ring", args, int((args.linear.k + 7) / 8 * 4), plan);
}

}  // namespace llmkern::cuda::kernels::ring
