// F32: a vector of floats as wide as the level allows, so that a kernel is written once and compiled per level.
//
// A level file <op>/<level>.cpp is two lines: include cpu/simd/<level>.h, then the kernel's .inl. That header defines
// LLMKERN_NS (the level's name) and, in namespace llmkern::LLMKERN_NS, everything below. Kernels must keep all their
// code in that namespace and use no inline function of the standard library beyond trivial ones: a function that two
// levels share is kept once by the linker, and then runs with the flags of either.
//
//   F32, F32::WIDTH              4 (baseline, neon_dotprod), 8 (avx2), 16 (avx512_vnni)
//   + - * /                      lane by lane
//   < <= > >= ==                 give a Mask; & | ~ combine masks
//   select(mask, yes, no)        lane by lane; first_lanes(n): Mask of the first n lanes; any(mask)
//   zero() set1(x) iota()        iota: 0, 1, 2, ...
//   fma(a, b, c)                 a * b + c; one rounding where the machine has it
//   min max abs sqrt             min and max return the second operand if either is NaN
//   round_even(x)                to an integer, ties to even
//   scale2(x, n)                 x * 2^n for whole n from -126 to 127; functions.h has exp, log1p and tanh
//   hsum(x) hmax(x)              over the lanes
//   load(p) store(p, x)          unaligned; load_partial(p, n) / store_partial(p, x, n) touch the first n lanes only
//   load_strided(p, stride)      p[0], p[stride], ...: a column of a row-major matrix, lanes = rows; also (p, stride,
//   n) store_strided(p, stride, x)  likewise; also (p, stride, x, n) gather(p, i)                 p[i[0]], p[i[1]], ...
//   with int32 indices in memory load_bf16 load_f16 load_i8   from WIDTH elements; store_bf16 store_f16 round to
//   nearest even load_as store_as load_one store_one convert_row    the same by DType, see memory.h prefetch(p) ask for
//   the cache line at p; any address is allowed; prefetch_far(p): into the second-level cache
#pragma once

#include <cstdint>

#include "common/dtype.h"

#define LLMKERN_INLINE static inline __attribute__((always_inline))
#define LLMKERN_INLINE_MEMBER inline __attribute__((always_inline))

namespace llmkern {

// How many vectors of `width` floats the registers hold.
constexpr int vector_registers([[maybe_unused]] int width) {
#if defined(__aarch64__)
    return 32;
#else
    return width == 16 ? 32 : 16;
#endif
}

}  // namespace llmkern
