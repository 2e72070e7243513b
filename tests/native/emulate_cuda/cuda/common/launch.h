// In the place of csrc/cuda/common/launch.h: runs the kernel on this CPU before it returns.
#pragma once

#include <cstddef>

#include "cuda/common/instructions.h"
#include "machine.h"

namespace llmkern::cuda {

struct Grid {
    unsigned x = 1, y = 1, z = 1;
    unsigned threads = 256;
    size_t shared_bytes = 0;
    unsigned cluster_x = 1, cluster_y = 1;
    bool overlap = false;
};

// Few, so that a block of a grid that fills the machine has more than one thing to do.
inline int multiprocessors(const char*) { return 2; }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), const Grid& grid, void*, const Arguments&... arguments) {
    emulated::run({int(grid.x), int(grid.y), int(grid.z)}, int(grid.threads), grid.shared_bytes,
                  {int(grid.cluster_x), int(grid.cluster_y), 1}, [&] { kernel(arguments...); });
}

}  // namespace llmkern::cuda
