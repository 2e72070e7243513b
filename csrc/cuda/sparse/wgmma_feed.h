// x and 2:4 weights on their way to shared memory, by the copy engine (common/tensor_map.h), which one thread asks for.
// A stage is 128 columns of K:
//
//   x          [2 parts of 64 columns][TOKENS][128 bytes], swizzled (common/matrix_descriptor.h)
//   values     [ROWS][UNITS of 16 bytes], of which unit u stands at u ^ swizzle(row): lanes of eight rows that read the
//              same unit touch all banks
//   positions  [ROWS][16 bytes]
//
// K is a multiple of a stage. What lies beyond the last row of x or w is zeros. With SHARED_X two blocks have the same
// rows and columns of x, of which each brings a half to both: what comes from L2 limits large products. In a cluster of
// such pairs, one for each part of K, a pair's blocks are 2 * split and the next.
#pragma once

#include "cuda/common/matrix_descriptor.h"
#include "cuda/common/tensor_map.h"
#include "cuda/common/wgmma.h"
#include "cuda/sparse/kept.h"

namespace llmkern::cuda {

constexpr int SPARSE_STAGE = 128;  // columns

template <class Format, int ROWS, int TOKENS, int USERS, bool SHARED_X>
struct SparseFeed {
    static constexpr int UNITS = SPARSE_STAGE / 4 * Format::QUAD_BYTES / 16;
    static constexpr int PART_BYTES = TOKENS * TILE_ROW_BYTES, X_BYTES = 2 * PART_BYTES;
    static constexpr int VALUE_BYTES = ROWS * UNITS * 16, STAGE_BYTES = X_BYTES + VALUE_BYTES + ROWS * 16;
    static constexpr int FIT = (226 * 1024 - 256) / STAGE_BYTES, STAGES = FIT < 8 ? FIT : 8;
    static constexpr int BARRIERS = STAGES * STAGE_BYTES, BYTES = BARRIERS + 2 * STAGES * int(sizeof(Barrier));
    static constexpr int BLOCKS = SHARED_X ? 2 : 1, X_ROWS = TOKENS / BLOCKS;  // of x that a block brings
    static_assert(STAGES >= 3 && STAGE_BYTES % 1024 == 0 && X_ROWS % 8 == 0, "");

    const int first, last;  // stages

    LLMKERN_DEVICE SparseFeed(const SparseArgs& args, int split)
        : first(int(int64_t(args.k / SPARSE_STAGE) * split / args.splits)),
          last(int(int64_t(args.k / SPARSE_STAGE) * (split + 1) / args.splits)) {}

    static LLMKERN_DEVICE uint8_t* stage_at(int slot) { return shared_memory() + slot * STAGE_BYTES; }
    // As tensor_map's.
    static LLMKERN_DEVICE int swizzle(int row) { return row / (8 / UNITS) % UNITS; }
    static LLMKERN_DEVICE int value_place(int row, int unit) { return (row * UNITS + (unit ^ swizzle(row))) * 16; }
    // The stage in a slot is there; it has been used, in all blocks that the next one goes to.
    static LLMKERN_DEVICE Barrier* full(int slot) {
        return reinterpret_cast<Barrier*>(shared_memory() + BARRIERS) + slot;
    }
    static LLMKERN_DEVICE Barrier* empty(int slot) { return full(STAGES + slot); }

    static LLMKERN_DEVICE void init() {
        if (thread() == 0)
            for (int slot = 0; slot < STAGES; slot++) {
                barrier_init(full(slot), 1);
                barrier_init(empty(slot), BLOCKS * USERS);
            }
        fence_barriers();
        SHARED_X ? sync_cluster() : sync_block();
    }

    // By a warp, whose lanes come together.
    static LLMKERN_DEVICE void release(int slot, bool here, int split) {
        sync_warp();
        const bool speaks = here && thread() % 32 == 0;
        if (SHARED_X) {
            barrier_arrive_at_if(speaks, empty(slot), 2 * split);
            barrier_arrive_at_if(speaks, empty(slot), 2 * split + 1);
        } else {
            barrier_arrive_if(speaks, empty(slot));
        }
    }

    struct Slot {  // in turns, with the parity of its phase
        int at = 0;
        uint32_t parity = 0;
        LLMKERN_DEVICE void next() {
            at = at + 1 == STAGES ? 0 : at + 1;
            parity ^= at == 0;
        }
    };

    // By one thread.
    LLMKERN_DEVICE void copy(const TensorMap& x, const TensorMap& values, const TensorMap& positions, int first_row,
                             int first_token, int rank, int split) const {
        Slot slot;
        const int token = first_token + rank * X_ROWS;
        for (int stage = first; stage < last; stage++) {
            barrier_wait(empty(slot.at), slot.parity ^ 1);
            uint8_t* const to = stage_at(slot.at);
            Barrier* const done = full(slot.at);
            barrier_expect(done, STAGE_BYTES);
            copy_tile(to + X_BYTES, values, stage * UNITS * 16, first_row, done);
            copy_tile(to + X_BYTES + VALUE_BYTES, positions, stage * 16, first_row, done);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                uint8_t* const at = to + part * PART_BYTES + rank * X_ROWS * TILE_ROW_BYTES;
                const int column = (2 * stage + part) * TILE_ROW_BYTES;
                SHARED_X ? copy_tile_to(uint16_t(3 << 2 * split), at, x, column, token, done)
                         : copy_tile(at, x, column, token, done);
            }
            slot.next();
        }
    }
};

}  // namespace llmkern::cuda
