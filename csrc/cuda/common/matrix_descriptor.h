// How an operand lies in shared memory for wgmma: PTX ISA, "Matrix descriptor" and "Shared memory matrix layout".
//
// A tile is rows of 128 bytes of K, at a multiple of 1024 bytes; in each eight rows (1024 bytes) the 16-byte unit u of
// row r stands at unit u ^ (r % 8), so that the same unit of eight rows touches all banks.
#pragma once

#include "cuda/common/instructions.h"

namespace llmkern::cuda {

constexpr int TILE_ROW_BYTES = 128;

// Where unit `unit` of a row stands in its tile.
LLMKERN_DEVICE int swizzled(int row, int unit) { return row * TILE_ROW_BYTES + (unit ^ (row & 7)) * 16; }

// The operand that starts `byte` bytes (a multiple of 32) into the rows of a tile.
LLMKERN_DEVICE uint64_t describe(const void* tile, int byte) {
    constexpr uint64_t LEADING = 1;         // means nothing when rows are swizzled
    constexpr uint64_t STRIDE = 1024 / 16;  // from eight rows to the next
    constexpr uint64_t SWIZZLE_128_BYTES = 1;
    const uint64_t start = ((shared_address(tile) + byte) & 0x3ffff) / 16;
    return start | LEADING << 16 | STRIDE << 32 | SWIZZLE_128_BYTES << 62;
}

}  // namespace llmkern::cuda
