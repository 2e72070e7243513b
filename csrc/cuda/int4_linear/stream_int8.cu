#include "cuda/int4_linear/int4_linear.h"
#include "cuda/linear/integer_stream.h"

namespace llmkern::cuda::kernels::stream {

void int4_linear_int8(const IntegerCodesArgs& args, const Plan& plan) {
    const int row_bytes = int((args.codes.linear.k + 7) / 8 * 4);
    launch_integer_stream<Int4Codes>("int4_linear: cuda.stream_int8", args, row_bytes, args.codes.group_size, plan);
}

}  // namespace llmkern::cuda::kernels::stream
