// sm_90a: products of a warpgroup with bytes, see wgmma.h for the order of a use.
#pragma once

#include "cuda/common/wgmma.h"

namespace llmkern::cuda {

// d += a b: a [64, 32], b [32, TOKENS], d as wgmma's; both described in shared memory (rows of 32 columns of a, rows of
// 32 rows of b, see matrix_descriptor.h).
template <int TOKENS>
LLMKERN_DEVICE void wgmma_s8(int (&d)[TOKENS / 8][4], uint64_t a, uint64_t b);
// With a from registers, of each warp's 16 rows: as mma_s8's.
template <int TOKENS>
LLMKERN_DEVICE void wgmma_s8(int (&d)[TOKENS / 8][4], const uint32_t (&a)[4], uint64_t b);

#if LLMKERN_HAS_WGMMA
#define LLMKERN_S8_SUM(t) "+r"(d[t][0]), "+r"(d[t][1]), "+r"(d[t][2]), "+r"(d[t][3])
#define LLMKERN_S8_SUMS4(t) LLMKERN_S8_SUM(t), LLMKERN_S8_SUM(t + 1), LLMKERN_S8_SUM(t + 2), LLMKERN_S8_SUM(t + 3)
#define LLMKERN_S8_SUMS32 LLMKERN_S8_SUMS4(0)
#define LLMKERN_S8_SUMS64 LLMKERN_S8_SUMS32, LLMKERN_S8_SUMS4(4)
#define LLMKERN_S8_SUMS96 LLMKERN_S8_SUMS64, LLMKERN_S8_SUMS4(8)
#define LLMKERN_S8_SUMS128 LLMKERN_S8_SUMS96, LLMKERN_S8_SUMS4(12)
#define LLMKERN_S8_SUMS256 \
    LLMKERN_S8_SUMS128, LLMKERN_S8_SUMS4(16), LLMKERN_S8_SUMS4(20), LLMKERN_S8_SUMS4(24), LLMKERN_S8_SUMS4(28)
#define LLMKERN_S8_D32 LLMKERN_TEN() ", %10, %11, %12, %13, %14, %15"
#define LLMKERN_S8_D64 LLMKERN_TEN() ", " LLMKERN_TEN(1) ", " LLMKERN_TEN(2) ", %30, %31"
#define LLMKERN_S8_D80 LLMKERN_TEN() ", " LLMKERN_TEN(1) ", " LLMKERN_TEN(2) ", " LLMKERN_TEN(3)
#define LLMKERN_S8_D96 LLMKERN_S8_D80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LLMKERN_S8_D120 LLMKERN_S8_D80 ", " LLMKERN_TEN(4) ", " LLMKERN_TEN(5)
#define LLMKERN_S8_D128 LLMKERN_S8_D120 ", %60, %61, %62, %63"
#define LLMKERN_S8_D200 LLMKERN_S8_D120 ", " LLMKERN_TEN(6) ", " LLMKERN_TEN(7) ", " LLMKERN_TEN(8) ", " LLMKERN_TEN(9)
#define LLMKERN_S8_D240 LLMKERN_S8_D200 ", " LLMKERN_TEN(10) ", " LLMKERN_TEN(11)
#define LLMKERN_S8_D256 LLMKERN_S8_D240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define LLMKERN_WGMMA_S8(tokens, a_at, b_at)                                                            \
    template <>                                                                                         \
    LLMKERN_DEVICE void wgmma_s8<tokens>(int (&d)[tokens / 8][4], uint64_t a, uint64_t b) {             \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k32.s32.s8.s8 {" LLMKERN_S8_D##tokens \
                     "}, %" #a_at ", %" #b_at ", 1;\n"                                                  \
                     : LLMKERN_S8_SUMS##tokens                                                          \
                     : "l"(a), "l"(b));                                                                 \
    }
#define LLMKERN_WGMMA_S8_REGISTERS(tokens, a0, a1, a2, a3, b_at)                                        \
    template <>                                                                                         \
    LLMKERN_DEVICE void wgmma_s8<tokens>(int (&d)[tokens / 8][4], const uint32_t (&a)[4], uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k32.s32.s8.s8 {" LLMKERN_S8_D##tokens \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_at ", 1;\n"                    \
                     : LLMKERN_S8_SUMS##tokens                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
    }
LLMKERN_WGMMA_S8_REGISTERS(64, 32, 33, 34, 35, 36)
LLMKERN_WGMMA_S8_REGISTERS(128, 64, 65, 66, 67, 68)
#undef LLMKERN_WGMMA_S8_REGISTERS
LLMKERN_WGMMA_S8(32, 16, 17)
LLMKERN_WGMMA_S8(64, 32, 33)
LLMKERN_WGMMA_S8(96, 48, 49)
LLMKERN_WGMMA_S8(128, 64, 65)
LLMKERN_WGMMA_S8(256, 128, 129)
#undef LLMKERN_WGMMA_S8
#else
template <int TOKENS>
LLMKERN_DEVICE void wgmma_s8(int (&)[TOKENS / 8][4], uint64_t, uint64_t) {}
template <int TOKENS>
LLMKERN_DEVICE void wgmma_s8(int (&)[TOKENS / 8][4], const uint32_t (&)[4], uint64_t) {}
#endif

}  // namespace llmkern::cuda
