#include "cuda/bitmask_linear/launch.h"
#include "cuda/bitmask_linear/tile.h"

namespace llmkern::cuda::kernels::mma {

template <class Tile>
void start(const MaskCall& call, void (*kernel)(MaskedArgs)) {
    call.launch(kernel, {Tile::ROWS / 16, Tile::TOKENS / 8, call.plan.splits}, Tile::SHARED);
}

void bitmask_linear(const MaskArgs& args, const Plan& plan) {
    for_mask_call("bitmask_linear: cuda.mma", args, plan, [](const MaskCall& call, auto type, auto value, auto scaled) {
        using T = decltype(type);
        using Value = decltype(value);
        constexpr Scaled SCALED = scaled();
        if (!call.aligned)
            return start<MaskTile<Value, T, 8, SCALED, false>>(call, mask_tile_kernel<Value, T, 8, SCALED, false>);
        if (call.plan.token_tiles <= 8)
            return start<MaskTile<Value, T, 8, SCALED, true>>(call, mask_tile_kernel<Value, T, 8, SCALED, true>);
        start<MaskTile<Value, T, 16, SCALED, true>>(call, mask_tile_kernel<Value, T, 16, SCALED, true>);
    });
}

}  // namespace llmkern::cuda::kernels::mma
