#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/launch_stream.h"

namespace llmkern::cuda::kernels::stream {

void int4_linear(const CodesArgs& args, const Plan& plan) {
    const int row_bytes = int((args.linear.k + 7) / 8 * 4);
    launch_stream<Int4>("int4_linear: cuda.stream", args, row_bytes, plan);
}

}  // namespace llmkern::cuda::kernels::stream
