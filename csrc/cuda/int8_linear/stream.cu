#include "cuda/int8_linear/int8_linear.h"
#include "cuda/linear/launch_stream.h"

namespace llmkern::cuda::kernels::stream {

void int8_linear(const CodesArgs& args, const Plan& plan) {
    launch_stream<Int8>("int8_linear: cuda.stream", args, int(args.linear.k), plan);
}

}  // namespace llmkern::cuda::kernels::stream
