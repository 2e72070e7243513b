// From the op's arguments to an instance of a kernel.
#pragma once

#include "cuda/bitmask_linear/bitmask_linear.h"
#include "cuda/bitmask_linear/masked_rows.h"
#include "cuda/linear/launch.h"

namespace llmkern::cuda {

struct MaskCall {
    const char* name;
    MaskedArgs args;
    Plan plan;
    bool aligned;
    void* stream;

    void launch(void (*kernel)(MaskedArgs), const Plan& sizes, size_t shared_bytes) const {
        const Grid grid = tile_grid(args.out.n, args.out.m, 16 * sizes.row_tiles, 8 * sizes.token_tiles, sizes.splits,
                                    256, shared_bytes);
        cuda::launch(name, kernel, grid, stream, args);
    }
};

// run(call, T, value type, Scaled) for what the arguments have, the last three as values of a type each.
template <class Run>
void for_mask_call(const char* name, const MaskArgs& from, const Plan& plan, const Run& run) {
    const LinearArgs& l = from.linear;
    const int groups = groups_of(l.k, from.group_size);
    const MaskCall call{name,
                        {l.x,
                         from.values,
                         from.bits,
                         from.row_offsets,
                         from.scales,
                         from.scales_dtype,
                         groups,
                         Divisor::of(uint32_t(from.group_size)),
                         int(l.k),
                         plan.splits,
                         {l.bias, l.bias_dtype, l.y, l.m, l.n}},
                        plan,
                        l.k % MASK_CHUNK == 0 && aligned_to(l.x, 16) && aligned_to(from.bits, 8),
                        l.stream};
    const auto of_type = [&](auto type) {
        if (from.values_dtype != DType::I8)
            return run(call, type, uint16_t(0), std::integral_constant<Scaled, Scaled::NOT>());
        if (groups == 1) return run(call, type, int8_t(0), std::integral_constant<Scaled, Scaled::SUMS>());
        run(call, type, int8_t(0), std::integral_constant<Scaled, Scaled::WEIGHTS>());
    };
    by_type(name, l.x_dtype, of_type);
}

}  // namespace llmkern::cuda
