#include "cuda/sparse/launch_ring.h"
#include "cuda/sparse24_linear/sparse24_linear.h"

namespace llmkern::cuda::kernels::ring {

void sparse24_linear(const KeptArgs& args, const Plan& plan) {
    launch_ring_kept<Kept16>("sparse24_linear: cuda.ring", args, plan);
}

}  // namespace llmkern::cuda::kernels::ring
