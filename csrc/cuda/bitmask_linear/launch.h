// From the op's arguments to an instance of a kernel.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/bitmask_linear/bitmask_linear.h"
#include "cuda/bitmask_linear/masked_rows.h"
#include "cuda/common/launch.h"
#include "cuda/sparse/launch.h"

namespace llmkern::cuda {

struct MaskCall {
    const char* name;
    MaskedArgs args;
    Plan plan;
    bool aligned;
    void* stream;

    void launch(void (*kernel)(MaskedArgs), const Plan& sizes, size_t shared_bytes) const {
        Grid grid;
        grid.x = unsigned((args.out.n + 16 * sizes.row_tiles - 1) / (16 * sizes.row_tiles));
        grid.y = grid.cluster_y = unsigned(sizes.splits);
        grid.z = unsigned((args.out.m + 8 * sizes.token_tiles - 1) / (8 * sizes.token_tiles));
        grid.threads = 256;
        grid.shared_bytes = shared_bytes;
        cuda::launch(name, kernel, grid, stream, args);
    }
};

// run(call, T, value type, Scaled) for what the arguments have, the last three as values of a type each.
template <class Run>
void for_mask_call(const char* name, const MaskArgs& from, const Plan& plan, const Run& run) {
    const LinearArgs& l = from.linear;
    const int groups = int((l.k + from.group_size - 1) / from.group_size);
    const auto at = [](const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    const MaskCall call{name,
                        {l.x,
                         from.values,
                         from.bits,
                         from.row_offsets,
                         from.scales,
                         from.scales_dtype,
                         groups,
                         int(from.group_size),
                         int(l.k),
                         plan.splits,
                         {l.bias, l.bias_dtype, l.y, l.m, l.n}},
                        plan,
                        l.k % MASK_CHUNK == 0 && at(l.x, 16) && at(from.bits, 8),
                        l.stream};
    const auto of_type = [&](auto type) {
        if (from.values_dtype != DType::I8)
            return run(call, type, uint16_t(0), std::integral_constant<Scaled, Scaled::NOT>());
        if (groups == 1) return run(call, type, int8_t(0), std::integral_constant<Scaled, Scaled::SUMS>());
        run(call, type, int8_t(0), std::integral_constant<Scaled, Scaled::WEIGHTS>());
    };
    for_type_of_x(name, l.x_dtype, of_type);
}

}  // namespace llmkern::cuda
