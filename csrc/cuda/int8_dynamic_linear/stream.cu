#include "cuda/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cuda/linear/integer_stream.h"

namespace llmkern::cuda::kernels::stream {

void int8_dynamic_linear(const IntegerCodesArgs& args, const Plan& plan) {
    const int64_t k = args.codes.linear.k;
    launch_integer_stream<Int8Codes>("int8_dynamic_linear: cuda.stream", args, int(k), k, plan);
}

}  // namespace llmkern::cuda::kernels::stream
