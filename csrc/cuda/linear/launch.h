// What launching any linear kernel needs: the type of x, alignment, the grid of a plan, and the refusal of one that no
// instance fits.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/common/instructions.h"
#include "cuda/common/launch.h"
#include "cuda/linear/linear.h"

namespace llmkern::cuda {

inline bool aligned_to(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// start(Bf16{}) or start(F16{}), by the type of x.
template <class Start>
auto by_type(const char* name, DType dtype, const Start& start) {
    if (dtype == DType::BF16) return start(Bf16{});
    if (dtype == DType::F16) return start(F16{});
    throw std::runtime_error(std::string(name) + ": x must be bf16 or fp16");
}

// Blocks of `rows` rows of w by `tokens` of x, K divided among a cluster's `splits`.
inline Grid tile_grid(int64_t n, int64_t m, int rows, int tokens, int splits, int threads, size_t shared_bytes) {
    Grid grid;
    grid.x = unsigned((n + rows - 1) / rows);
    grid.y = grid.cluster_y = unsigned(splits);
    grid.z = unsigned((m + tokens - 1) / tokens);
    grid.threads = unsigned(threads);
    grid.shared_bytes = shared_bytes;
    return grid;
}

inline int groups_of(int64_t k, int64_t group_size) { return int((k + group_size - 1) / group_size); }

inline void check_group_multiple(const char* name, int groups, int64_t group_size, int multiple) {
    if (groups > 1 && group_size % multiple)
        throw std::runtime_error(std::string(name) + ": no multiple of " + std::to_string(multiple) +
                                 " columns in a group: " + std::to_string(group_size));
}

[[noreturn]] inline void no_instance(const char* name, const Plan& plan) {
    throw std::runtime_error(std::string(name) + ": no instance for " + std::to_string(plan.row_tiles) +
                             " tiles of rows and " + std::to_string(plan.token_tiles) + " of tokens");
}

}  // namespace llmkern::cuda
