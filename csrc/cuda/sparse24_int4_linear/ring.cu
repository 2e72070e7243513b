#include "cuda/sparse/launch_ring.h"
#include "cuda/sparse24_int4_linear/sparse24_int4_linear.h"

namespace llmkern::cuda::kernels::ring {

void sparse24_int4_linear(const KeptArgs& args, const Plan& plan) {
    launch_ring_kept<KeptInt4>("sparse24_int4_linear: cuda.ring", args, plan);
}

}  // namespace llmkern::cuda::kernels::ring
