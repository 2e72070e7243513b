#include "cuda/bitmask_linear/stream.h"

#include "cuda/bitmask_linear/launch.h"

namespace llmkern::cuda::kernels::stream {

void bitmask_linear(const MaskArgs& args, const Plan& plan) {
    for_mask_call("bitmask_linear: cuda.stream", args, plan,
                  [](const MaskCall& call, auto type, auto value, auto scaled) {
                      using T = decltype(type);
                      using Value = decltype(value);
                      constexpr Scaled SCALED = scaled();
                      const auto start = [&](auto kernel, int token_tiles) {
                          call.launch(kernel, {1, token_tiles, call.plan.splits}, MASK_STREAM_SHARED);
                      };
                      if (!call.aligned) return start(mask_stream_kernel<Value, T, 1, SCALED, false>, 1);
                      if (call.plan.token_tiles == 1) return start(mask_stream_kernel<Value, T, 1, SCALED, true>, 1);
                      start(mask_stream_kernel<Value, T, 2, SCALED, true>, 2);
                  });
}

}  // namespace llmkern::cuda::kernels::stream
