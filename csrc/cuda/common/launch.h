// Launching a kernel from the host: every error becomes an exception that names the kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace llmkern::cuda {

struct Grid {
    unsigned x = 1, y = 1, z = 1;
    unsigned threads = 256;
    size_t shared_bytes = 0;
    unsigned cluster_y = 1;  // blocks along y that share a cluster; more than 1 needs sm_90
};

inline void check(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

// In the order of `stream`, without waiting for it.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, void* stream,
            const Arguments&... arguments) {
    if (grid.shared_bytes > 48 * 1024)
        check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, grid.cluster_y, 1};
    config.attrs = &cluster;
    config.numAttrs = grid.cluster_y > 1 ? 1 : 0;
    check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace llmkern::cuda
