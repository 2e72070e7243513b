// Kept values and where they stand, decoded to F32: what the sparse formats share.
//
// A chunk is EXPAND_CHUNK columns: a bit per column, and the kept values of the set bits one after the other. Each
// level's header in this directory defines, in its namespace after cpu/simd/<level>.h,
//
//   EXPAND_VECTORS, EXPAND_CHUNK    vectors and columns per chunk
//   expanded_column<ORDER>(p)       the column that lane p of a decoded chunk holds
//   bits_of_positions(p)            the bits of a chunk from its 2:4 positions, one nibble per four columns; or
//   whatever
//                                   else the level's expand and compact with TWO_OF_FOUR want
//   expand<KEPT, ORDER, COUNT>(w, bits, from, scale)
//                                   w[lane] = kept value times scale where the column's bit is set, else 0; float
//                                   values are not scaled. With TWO_OF_FOUR it reads EXPAND_CHUNK / 2 values, else up
//                                   to EXPAND_CHUNK: fewer may be used, all must be readable
//
// and, if skip.inl is to multiply many rows of x, LLMKERN_COMPACT and
//
//   compact<KEPT, COUNT>(values, places, bits, from, scale, first, stride)
//                                   the kept values times scale side by side, and for each (first + its column) *
//                                   stride; returns how many. Up to EXPAND_CHUNK of both are written
// 2:4 weights take the ways of kept_pairs.inl at the level that defines LLMKERN_PAIR_STREAM.
#pragma once

#include <cstdint>

namespace llmkern {

enum class Kept { F32, BF16, F16, I8, I4 };  // I4: u = q + 8, two per byte, the low nibble first
enum class Count { TWO_OF_FOUR, ANY };
// FAST: whatever the level decodes best; NATURAL: column p in lane p (scales that change within a chunk need it).
enum class Order { FAST, NATURAL };

// Bytes of `count` values (an even number for I4).
constexpr int64_t kept_bytes(Kept kept, int64_t count) {
    return kept == Kept::F32 ? 4 * count : kept == Kept::I8 ? count : kept == Kept::I4 ? count / 2 : 2 * count;
}

}  // namespace llmkern
