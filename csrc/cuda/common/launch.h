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
    unsigned cluster_x = 1, cluster_y = 1;  // blocks that share a cluster; more than 1 needs sm_90
    bool overlap = false;  // may start while the stream's previous kernel ends: it calls dependency_wait() itself
};

inline void check(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

// Compute capability of the current device, its first number.
inline int major(const char* kernel) {
    int device, found;
    check(kernel, cudaGetDevice(&device));
    check(kernel, cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, device));
    return found;
}

inline int multiprocessors(const char* kernel) {
    int device, found;
    check(kernel, cudaGetDevice(&device));
    check(kernel, cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device));
    return found;
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
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (grid.cluster_x * grid.cluster_y > 1) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {grid.cluster_x, grid.cluster_y, 1};
    }
    if (grid.overlap && major(name) >= 9) {
        cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace llmkern::cuda
