// sm_90a: products of a warpgroup, four warps that multiply a [64, 16] with b [16, TOKENS] in the background. PTX ISA,
// "Asynchronous warpgroup level matrix multiply-accumulate instructions". The order of a use:
//
//   write shared memory; fence_async(); sync_block()   operands in shared memory are read by another way (a proxy)
//   wgmma_fence()                                      after registers of d or a were written
//   wgmma<T, TOKENS>(d, a, b) ...; wgmma_commit()      d, a and b's memory are not to be touched from here
//   wgmma_wait<PENDING>()                              until no more than PENDING groups are under way
//
// Compiled for another machine the functions do nothing; LLMKERN_HAS_WGMMA says so to kernels.
#pragma once

#include "cuda/common/instructions.h"
#include "cuda/common/matrix_descriptor.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LLMKERN_HAS_WGMMA 1
#define LLMKERN_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define LLMKERN_HAS_WGMMA 0
#define LLMKERN_WGMMA_ASM(...)
#endif

namespace llmkern::cuda {

LLMKERN_DEVICE void fence_async() { LLMKERN_WGMMA_ASM("fence.proxy.async.shared::cta;\n" :: : "memory"); }
LLMKERN_DEVICE void wgmma_fence() { LLMKERN_WGMMA_ASM("wgmma.fence.sync.aligned;\n" :: : "memory"); }
LLMKERN_DEVICE void wgmma_commit() { LLMKERN_WGMMA_ASM("wgmma.commit_group.sync.aligned;\n" :: : "memory"); }
template <int PENDING>
LLMKERN_DEVICE void wgmma_wait() {
    LLMKERN_WGMMA_ASM("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// d += a b. d[t][i]: with g = lane / 4, c = lane % 4, warp w of the warpgroup: row 16w + g, and 8 more for i >= 2;
// column 8t + 2c + i % 2. a from registers: rows 16w and on, as mma's a; or from shared memory, described as b is (rows
// of 16 columns of a, rows of 16 rows of b, see matrix_descriptor.h).
template <class T, int TOKENS>
LLMKERN_DEVICE void wgmma(float (&d)[TOKENS / 8][4], const uint32_t (&a)[4], uint64_t b);
template <class T, int TOKENS>
LLMKERN_DEVICE void wgmma(float (&d)[TOKENS / 8][4], uint64_t a, uint64_t b);

// The operands of an instruction by number, and what they are: d's first, then a's, then b's.
#define LLMKERN_TEN(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define LLMKERN_D16 LLMKERN_TEN() ", %10, %11, %12, %13, %14, %15"
#define LLMKERN_D24 LLMKERN_TEN() ", " LLMKERN_TEN(1) ", %20, %21, %22, %23"
#define LLMKERN_D32 LLMKERN_TEN() ", " LLMKERN_TEN(1) ", " LLMKERN_TEN(2) ", %30, %31"
#define LLMKERN_D40 LLMKERN_TEN() ", " LLMKERN_TEN(1) ", " LLMKERN_TEN(2) ", " LLMKERN_TEN(3)
#define LLMKERN_D48 LLMKERN_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LLMKERN_D64 LLMKERN_D40 ", " LLMKERN_TEN(4) ", " LLMKERN_TEN(5) ", %60, %61, %62, %63"
#define LLMKERN_D80 LLMKERN_D40 ", " LLMKERN_TEN(4) ", " LLMKERN_TEN(5) ", " LLMKERN_TEN(6) ", " LLMKERN_TEN(7)
#define LLMKERN_D100 LLMKERN_D80 ", " LLMKERN_TEN(8) ", " LLMKERN_TEN(9)
#define LLMKERN_D120 LLMKERN_D100 ", " LLMKERN_TEN(10) ", " LLMKERN_TEN(11)
#define LLMKERN_D128 LLMKERN_D120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define LLMKERN_SUM(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define LLMKERN_SUMS4 LLMKERN_SUM(0), LLMKERN_SUM(1), LLMKERN_SUM(2), LLMKERN_SUM(3)
#define LLMKERN_SUMS6 LLMKERN_SUMS4, LLMKERN_SUM(4), LLMKERN_SUM(5)
#define LLMKERN_SUMS8 LLMKERN_SUMS6, LLMKERN_SUM(6), LLMKERN_SUM(7)
#define LLMKERN_SUMS10 LLMKERN_SUMS8, LLMKERN_SUM(8), LLMKERN_SUM(9)
#define LLMKERN_SUMS12 LLMKERN_SUMS10, LLMKERN_SUM(10), LLMKERN_SUM(11)
#define LLMKERN_SUMS16 LLMKERN_SUMS12, LLMKERN_SUM(12), LLMKERN_SUM(13), LLMKERN_SUM(14), LLMKERN_SUM(15)
#define LLMKERN_FOUR_SUMS(a, b, c, d) LLMKERN_SUM(a), LLMKERN_SUM(b), LLMKERN_SUM(c), LLMKERN_SUM(d)
#define LLMKERN_SUMS24 LLMKERN_SUMS16, LLMKERN_FOUR_SUMS(16, 17, 18, 19), LLMKERN_FOUR_SUMS(20, 21, 22, 23)
#define LLMKERN_SUMS32 LLMKERN_SUMS24, LLMKERN_FOUR_SUMS(24, 25, 26, 27), LLMKERN_FOUR_SUMS(28, 29, 30, 31)

// Both forms of one shape for one type: d += (1 x) a (1 x) b, b not transposed. `registers` of d, in `tiles` tiles.
#define LLMKERN_WGMMA_TYPE(T, type, tokens, tiles, registers, a0, a1, a2, a3, b0)                         \
    template <>                                                                                           \
    LLMKERN_DEVICE void wgmma<T, tokens>(float (&d)[tokens / 8][4], const uint32_t (&a)[4], uint64_t b) { \
        LLMKERN_WGMMA_ASM("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type            \
                          " {" LLMKERN_D##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0  \
                                                    ", 1, 1, 1, 0;\n" : LLMKERN_SUMS##tiles : "r"(a[0]),  \
                          "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
    }                                                                                                     \
    template <>                                                                                           \
    LLMKERN_DEVICE void wgmma<T, tokens>(float (&d)[tokens / 8][4], uint64_t a, uint64_t b) {             \
        LLMKERN_WGMMA_ASM("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type            \
                          " {" LLMKERN_D##registers "}, %" #a0 ", %" #a1                                  \
                                                    ", 1, 1, 1, 0, 0;\n" : LLMKERN_SUMS##tiles : "l"(a),  \
                          "l"(b));                                                                        \
    }
#define LLMKERN_WGMMA(...)                        \
    LLMKERN_WGMMA_TYPE(Bf16, "bf16", __VA_ARGS__) \
    LLMKERN_WGMMA_TYPE(F16, "f16", __VA_ARGS__)

LLMKERN_WGMMA(32, 4, 16, 16, 17, 18, 19, 20)
LLMKERN_WGMMA(48, 6, 24, 24, 25, 26, 27, 28)
LLMKERN_WGMMA(64, 8, 32, 32, 33, 34, 35, 36)
LLMKERN_WGMMA(80, 10, 40, 40, 41, 42, 43, 44)
LLMKERN_WGMMA(96, 12, 48, 48, 49, 50, 51, 52)
LLMKERN_WGMMA(128, 16, 64, 64, 65, 66, 67, 68)
LLMKERN_WGMMA(256, 32, 128, 128, 129, 130, 131, 132)

#undef LLMKERN_WGMMA
#undef LLMKERN_WGMMA_TYPE
#undef LLMKERN_WGMMA_ASM

}  // namespace llmkern::cuda
