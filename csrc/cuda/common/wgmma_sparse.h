// sm_90a: as wgmma.h, with a 2:4 sparse: d += a b with a [64, 32] as its kept [64, 16], held as wgmma's a; b [32,
// TOKENS] in shared memory, rows of 32 columns of K. `positions` and SELECTOR: as mma_sparse's, for the 16 rows of each
// warp.
#pragma once

#include "cuda/common/wgmma.h"

#if LLMKERN_HAS_WGMMA
#define LLMKERN_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define LLMKERN_WGMMA_ASM(...)
#endif

namespace llmkern::cuda {

template <class T, int TOKENS, int SELECTOR>
LLMKERN_DEVICE void wgmma_sparse(float (&d)[TOKENS / 8][4], const uint32_t (&a)[4], const uint32_t& positions,
                                 uint64_t b);

#define LLMKERN_WGMMA_SPARSE(T, type, selector, tokens, tiles, registers, a0, a1, a2, a3, b0, p0)                  \
    template <>                                                                                                    \
    LLMKERN_DEVICE void wgmma_sparse<T, tokens, selector>(float (&d)[tokens / 8][4], const uint32_t (&a)[4],       \
                                                          const uint32_t& positions, uint64_t b) {                 \
        LLMKERN_WGMMA_ASM("wgmma.mma_async.sp.sync.aligned.m64n" #tokens "k32.f32." type "." type                  \
                          " {" LLMKERN_D##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", %" #p0 \
                                                    ", " #selector                                                 \
                                                    ", 1, 1, 1, 0;\n" : LLMKERN_SUMS##tiles : "r"(a[0]),           \
                          "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(positions));                                \
    }
#define LLMKERN_WGMMA_SPARSE_ALL(...)                  \
    LLMKERN_WGMMA_SPARSE(Bf16, "bf16", 0, __VA_ARGS__) \
    LLMKERN_WGMMA_SPARSE(Bf16, "bf16", 1, __VA_ARGS__) \
    LLMKERN_WGMMA_SPARSE(F16, "f16", 0, __VA_ARGS__)   \
    LLMKERN_WGMMA_SPARSE(F16, "f16", 1, __VA_ARGS__)

LLMKERN_WGMMA_SPARSE_ALL(64, 8, 32, 32, 33, 34, 35, 36, 37)
LLMKERN_WGMMA_SPARSE_ALL(128, 16, 64, 64, 65, 66, 67, 68, 69)

#undef LLMKERN_WGMMA_SPARSE_ALL
#undef LLMKERN_WGMMA_SPARSE
#undef LLMKERN_WGMMA_ASM

}  // namespace llmkern::cuda
