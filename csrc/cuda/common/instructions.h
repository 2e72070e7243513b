// The GPU as kernels see it: indices, barriers, memory, and one function per PTX instruction that C++ has no word for.
// Kernels use nothing of CUDA but these and its qualifiers, so that they also run on a CPU, thread by thread, with
// tests/native/emulate_cuda in the place of this file. Fragment layouts are those of the PTX ISA, "Matrix multiply-
// accumulate operation using mma instruction".
#pragma once

#include <cstdint>
#include <type_traits>

#define LLMKERN_DEVICE __device__ __forceinline__

namespace llmkern::cuda {

// Element types of activations. Two of them in one register are a pair: the lower half is the first.
struct Bf16 {};
struct F16 {};

struct alignas(8) Words2 {
    uint32_t w[2];
};
struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(16) Floats4 {
    float f[4];
};

LLMKERN_DEVICE int thread() { return threadIdx.x; }
LLMKERN_DEVICE int block_x() { return blockIdx.x; }
LLMKERN_DEVICE int block_y() { return blockIdx.y; }
LLMKERN_DEVICE int block_z() { return blockIdx.z; }

extern __shared__ __align__(1024) uint8_t llmkern_shared[];
LLMKERN_DEVICE uint8_t* shared_memory() { return llmkern_shared; }
LLMKERN_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

LLMKERN_DEVICE void sync_block() { __syncthreads(); }
LLMKERN_DEVICE void sync_warp() { __syncwarp(); }

template <class V>
LLMKERN_DEVICE V shuffle(V value, int lane) {
    return __shfl_sync(0xffffffff, value, lane);
}

template <class V>
LLMKERN_DEVICE V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
}

// Blocks of a cluster; without clusters (before sm_90) a block is its own.
#if __CUDA_ARCH__ >= 900
LLMKERN_DEVICE void sync_cluster() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;\n" ::
            : "memory");
}

// What the block of this rank in the cluster has at the same place of its shared memory.
LLMKERN_DEVICE float load_cluster(const float* mine, int rank) {
    float value;
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [there];\n}\n"
        : "=f"(value)
        : "r"(shared_address(mine)), "r"(rank)
        : "memory");
    return value;
}
LLMKERN_DEVICE int load_cluster(const int* mine, int rank) {
    return __float_as_int(load_cluster(reinterpret_cast<const float*>(mine), rank));
}
LLMKERN_DEVICE Words4 load_cluster(const Words4* mine, int rank) {
    Words4 v;
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [there];\n}\n"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "r"(shared_address(mine)), "r"(rank)
        : "memory");
    return v;
}
LLMKERN_DEVICE Floats4 load_cluster(const Floats4* mine, int rank) {
    Floats4 v;
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
        : "=f"(v.f[0]), "=f"(v.f[1]), "=f"(v.f[2]), "=f"(v.f[3])
        : "r"(shared_address(mine)), "r"(rank)
        : "memory");
    return v;
}
#else
LLMKERN_DEVICE void sync_cluster() { __syncthreads(); }
LLMKERN_DEVICE float load_cluster(const float* mine, int) { return *mine; }
LLMKERN_DEVICE int load_cluster(const int* mine, int) { return *mine; }
LLMKERN_DEVICE Words4 load_cluster(const Words4* mine, int) { return *mine; }
LLMKERN_DEVICE Floats4 load_cluster(const Floats4* mine, int) { return *mine; }
#endif

// With Grid::overlap: until all that earlier kernels of the stream wrote is there to be read. Before it a kernel may
// bring weights into L2, which is no reading of them, and must not write. After it the next kernel may start likewise.
// Before sm_90 kernels do not overlap.
#if __CUDA_ARCH__ >= 900
LLMKERN_DEVICE void dependency_wait() {
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n" ::: "memory");
}
#else
LLMKERN_DEVICE void dependency_wait() {}
#endif
LLMKERN_DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address)); }

// 16 bytes that are read once: past L1, and a whole line of L2 at a time.
LLMKERN_DEVICE Words4 load_once(const void* address) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(address));
    return v;
}

LLMKERN_DEVICE Words2 load_once8(const void* address) {
    Words2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n"
                 : "=r"(v.w[0]), "=r"(v.w[1])
                 : "l"(address));
    return v;
}

// 16 bytes that other warps read too.
LLMKERN_DEVICE Words4 load_shared_use(const void* address) {
    Words4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(address));
    return v;
}

// 4 bytes, or 2 with zeros above, without a branch between the two.
LLMKERN_DEVICE uint32_t load_2_or_4(const void* address, bool four) {
    uint32_t v;
    asm volatile(
        "{\n.reg .pred four;\n"
        "setp.ne.s32 four, %2, 0;\n"
        "@four ld.global.nc.u32 %0, [%1];\n"
        "@!four ld.global.nc.u16 %0, [%1];\n}\n"
        : "=r"(v)
        : "l"(address), "r"(int(four)));
    return v;
}

// Shared memory from global memory in the background: `bytes` (0 to 16) of the 16, zeros for the rest; into L2 comes
// the whole line.
LLMKERN_DEVICE void copy_async(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
}
// The same with 8 bytes.
LLMKERN_DEVICE void copy_async8(void* to, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
// All 16, or zeros: which takes fewer instructions.
LLMKERN_DEVICE void copy_async_if(bool there, void* to, const void* from) {
    asm volatile(
        "{\n.reg .pred none;\n"
        "setp.eq.u32 none, %2, 0;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, none;\n}\n" ::"r"(shared_address(to)),
        "l"(from), "r"(uint32_t(there))
        : "memory");
}
LLMKERN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until no more than PENDING of this thread's groups are under way.
template <int PENDING>
LLMKERN_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory, whose rows lane 8i + j points to: d[i] of lane 4j + c is word c
// of row j of matrix i.
LLMKERN_DEVICE void load_matrices(uint32_t (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Bytes of a and b by the selector's nibbles: 0 to 3 are a's, 4 to 7 b's.
LLMKERN_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// (a & mask) | bits in one instruction: left to itself the compiler takes two rather than a register for a constant.
LLMKERN_DEVICE uint32_t mask_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}
LLMKERN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
LLMKERN_DEVICE int popcount(uint32_t a) { return __popc(a); }
// The larger of each two halves, as unsigned integers.
LLMKERN_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
// c + the products of four signed bytes each.
LLMKERN_DEVICE int dot4(uint32_t a, uint32_t b, int c) { return __dp4a(int(a), int(b), c); }

template <class T>
LLMKERN_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
LLMKERN_DEVICE uint32_t fma2<Bf16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
LLMKERN_DEVICE uint32_t fma2<F16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// A pair from two floats, rounded to nearest, ties to even.
template <class T>
LLMKERN_DEVICE uint32_t pack2(float first, float second);
template <>
LLMKERN_DEVICE uint32_t pack2<Bf16>(float first, float second) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(d) : "f"(second), "f"(first));
    return d;
}
template <>
LLMKERN_DEVICE uint32_t pack2<F16>(float first, float second) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(d) : "f"(second), "f"(first));
    return d;
}

LLMKERN_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

template <class T>
LLMKERN_DEVICE float to_float(uint16_t value);
template <>
LLMKERN_DEVICE float to_float<Bf16>(uint16_t value) {
    return __uint_as_float(uint32_t(value) << 16);
}
template <>
LLMKERN_DEVICE float to_float<F16>(uint16_t value) {
    float f;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(f) : "h"(value));
    return f;
}

LLMKERN_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
LLMKERN_DEVICE int round_to_int(float value) { return __float2int_rn(value); }

// Single roundings, to nearest, ties to even, which the compiler neither fuses nor splits.
LLMKERN_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
LLMKERN_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
LLMKERN_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LLMKERN_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
LLMKERN_DEVICE float round_even(float value) { return rintf(value); }
// Of a NaN and a number, the number.
LLMKERN_DEVICE float minimum(float a, float b) { return fminf(a, b); }
LLMKERN_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
// The value, computed here: the compiler may not put it off into a loop that comes later.
LLMKERN_DEVICE float settle(float value) {
    asm volatile("" : "+f"(value));
    return value;
}
LLMKERN_DEVICE uint32_t settle(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}
// The same for a pointer: adding to the last one takes less than a product for each.
LLMKERN_DEVICE const uint8_t* settle(const uint8_t* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
}
LLMKERN_DEVICE float absolute(float value) { return fabsf(value); }

// d += a b: a [16, 16], b [16, 8], d [16, 8]. With g = lane / 4, c = lane % 4: a[0] and a[2] are row g, columns 2c and
// 2c + 8; a[1] and a[3] row g + 8; b[0] and b[1] rows 2c and 2c + 8 of column g; d[0..1] row g, columns 2c, 2c + 1;
// d[2..3] row g + 8.
template <class T>
LLMKERN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
LLMKERN_DEVICE void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
LLMKERN_DEVICE void mma<F16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with int8: a [16, 32], b [32, 8]; a register holds four bytes, columns 4c to 4c + 3 and 16 further.
LLMKERN_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b with a 2:4 sparse: a [16, 32] as its kept [16, 16], held as mma's a; b [32, 8] in b[0..3], rows 2c + 8i of
// column g. `positions`: a nibble per quad of a row, the first kept column in its lower two bits. With SELECTOR s, lane
// 4g + 2s + h has quads 4h to 4h + 3 of row g in its lower half and of row g + 8 in its upper.
template <class T, int SELECTOR>
LLMKERN_DEVICE void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
#define LLMKERN_MMA_SPARSE(type)                                                                                  \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                               \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions), \
          "n"(SELECTOR))
    if constexpr (std::is_same_v<T, Bf16>)
        LLMKERN_MMA_SPARSE("bf16");
    else
        LLMKERN_MMA_SPARSE("f16");
#undef LLMKERN_MMA_SPARSE
}

}  // namespace llmkern::cuda
