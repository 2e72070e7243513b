#include "cuda/int8_linear/int8_linear.h"
#include "cuda/linear/launch_ring_codes.h"

namespace llmkern::cuda::kernels::ring {

void int8_linear(const CodesArgs& args, const Plan& plan) {
    launch_ring_codes<Int8>("int8_linear: cuda.ring", args, int(args.linear.k), plan);
}

}  // namespace llmkern::cuda::kernels::ring
