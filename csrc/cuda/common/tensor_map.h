// sm_90: tiles of a matrix to shared memory by the copy engine (TMA), which one thread asks for (PTX ISA,
// "cp.async.bulk. tensor"). The order of a use, with barriers of barrier.h:
//
//   barrier_expect(b, bytes)              one arrival, and that many bytes are to come before the phase is over
//   copy_tile(to, map, column, row, b)    the engine counts them off; copy_bytes likewise, without a matrix
//   barrier_wait(b, parity)               what it wrote is there, for wgmma too
//
// In a cluster a tile can go to several blocks, to the same place of each one's shared memory, and be counted there.
#pragma once

#include <cuda.h>

#include "cuda/common/barrier.h"
#include "cuda/common/launch.h"

namespace llmkern::cuda {

using TensorMap = CUtensorMap;
#define LLMKERN_GRID_CONSTANT const __grid_constant__

// Of bytes: `rows` rows of `columns`, `row_bytes` apart (a multiple of 16, as the address); tiles of box_rows (up to
// 256) times box_columns (16, 32, 64 or 128), the latter as matrix_descriptor.h wants them: where 16 bytes stand, is
// xored with bits 7 and up of the place, as many as a row has such bits. Beyond the matrix are zeros.
inline TensorMap tensor_map(const char* name, const void* at, int64_t columns, int64_t rows, int64_t row_bytes,
                            int box_columns, int box_rows) {
    static const auto encode = [&] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        check(name,
              cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        if (result != cudaDriverEntryPointSuccess)
            throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    TensorMap map;
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(row_bytes)};
    const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
    const auto swizzle = box_columns == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                         : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                             : CU_TENSOR_MAP_SWIZZLE_NONE;
    const CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(at), sizes, strides, box,
                                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled: error " + std::to_string(int(error)));
    return map;
}

#if __CUDA_ARCH__ >= 900
LLMKERN_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// After barriers of a cluster's blocks have been initialised, before sync_cluster().
LLMKERN_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

// At the barrier that the cluster's block `rank` has in this place: what this thread has read there, may be
// overwritten. Nothing that it wrote is made known there, which would take a fence of the whole cluster.
LLMKERN_DEVICE void barrier_arrive_at_if(bool here, Barrier* barrier, int rank) {
    asm volatile(
        "{\n.reg .pred here;\n.reg .u32 there;\n"
        "setp.ne.u32 here, %2, 0;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "@here mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
        "r"(rank), "r"(uint32_t(here))
        : "memory");
}

// Bytes as they lie: all three multiples of 16.
LLMKERN_DEVICE void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

LLMKERN_DEVICE void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::
            "r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// The map itself, which the first tile would wait for.
LLMKERN_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Into L2 only: no reading of it.
LLMKERN_DEVICE void prefetch_tile(const TensorMap& map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];\n" ::"l"(reinterpret_cast<uint64_t>(&map)),
                 "r"(column), "r"(row)
                 : "memory");
}

// To the blocks of the cluster whose bits are set.
LLMKERN_DEVICE void copy_tile_to(uint16_t blocks, void* to, const TensorMap& map, int column, int row,
                                 Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%2, "
        "%3}], [%4], %5;\n" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}
#else
LLMKERN_DEVICE void barrier_expect(Barrier*, int) {}
LLMKERN_DEVICE void fence_barriers() {}
LLMKERN_DEVICE void barrier_arrive_at_if(bool, Barrier*, int) {}
LLMKERN_DEVICE void prefetch_map(const TensorMap&) {}
LLMKERN_DEVICE void prefetch_tile(const TensorMap&, int, int) {}
LLMKERN_DEVICE void copy_bytes(void*, const void*, int, Barrier*) {}
LLMKERN_DEVICE void copy_tile(void*, const TensorMap&, int, int, Barrier*) {}
LLMKERN_DEVICE void copy_tile_to(uint16_t, void*, const TensorMap&, int, int, Barrier*) {}
#endif

}  // namespace llmkern::cuda
