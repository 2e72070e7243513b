// The integer linear driver for the level of the file that includes this, after cpu/simd/<level>.h and
// cpu/linear/dot_<level>.h.
#pragma once

#include "cpu/linear/driver.h"

namespace llmkern::LLMKERN_NS {

#include "cpu/linear/quantize.inl"

#include "cpu/linear/integer.inl"

#ifdef LLMKERN_BYTE_DOT
#if defined(LLMKERN_QUAD_DOT)
#include "cpu/linear/integer_quad.inl"
#elif defined(LLMKERN_WIDE_QUADS)
#include "cpu/linear/integer_quad_wide.inl"
#else
#include "cpu/linear/integer_fast.inl"
#endif

#include "cpu/linear/integer_tile.inl"
#endif

#ifdef LLMKERN_TILE_DOT
#include "cpu/linear/amx_integer.inl"
#endif

// Quantized x times the weight whose codes `weight` gives; x is quantized per `x_group` columns: k, or the weight's.
template <class Rows>
void run_integer(const LinearArgs& a, const GroupArgs& groups, int64_t x_group, const Rows& weight) {
    if (a.k == 0) return write_bias(a);
    const int threads = worth_threads(a);
#ifdef LLMKERN_TILE_DOT
    if (run_amx_integer(a, groups, x_group, weight, threads)) return;
#endif
#ifdef LLMKERN_BYTE_DOT
    if constexpr (Rows::Dot::FAST)
        if (a.m <= STREAM_ROWS<typename Rows::Dot> && run_integer_fast(a, groups, x_group, weight, threads)) return;
    if constexpr (Rows::Tile::FAST)
        if (run_tiles(a, groups, x_group, weight, threads)) return;
#endif
    run_integer_any(a, groups, x_group, weight, threads);
}

}  // namespace llmkern::LLMKERN_NS
