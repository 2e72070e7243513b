// What the warps of wgmma_kernel share: its tiles of y, and the ring of stages in shared memory that some fill and
// others use. A stage is 64 columns of K:
//
//   x       [TOKENS][128 bytes], swizzled (common/matrix_descriptor.h)
//   codes   [ROWS][32 bytes] of int4, [ROWS][64 bytes] of int8, of which 16 bytes u stand at u ^ (row / 4 % 2) or
//           u ^ (row / 2 % 4)
//   scales  [SLOTS][ROWS], a slot per 16 bytes of a row's codes: a pair of T, and what `neighbours` adds for the zero
//
// `full` of a stage is over when all that fill it have arrived, `empty` when all that use it have. With more than 128
// rows of x two blocks of a cluster have the same ones, of which each brings a half to both (what comes from L2 limits
// large products): there `empty` is over when the users of both have arrived.
#pragma once

#include "cuda/common/tensor_map.h"
#include "cuda/linear/tile_feed.h"

namespace llmkern::cuda {

struct WgmmaArgs {
    TileArgs tile;
    int row_blocks, token_blocks;  // tiles of y, or pairs of them that share rows of x
    int blocks;                    // that share them, or clusters
    bool engine;                   // x and codes come by the copy engine: all rows start at multiples of 16 bytes
};

// Each of WARPGROUPS multiplies 64 rows of w.
template <class Format, class T, int WARPGROUPS, int TOKENS_>
struct WgmmaRing {
    static constexpr int ROWS = WARPGROUPS * 64, TOKENS = TOKENS_;
    using Piece = typename Format::Piece;
    static constexpr int USERS = WARPGROUPS * 128, FILLERS = 128, THREADS = USERS + FILLERS;
    static constexpr int BLOCKS = TOKENS > 128 ? 2 : 1, X_ROWS = TOKENS / BLOCKS;  // of x that a block brings
    static constexpr int LANE = Format::LANE_COLUMNS, UNITS = TILE_COLUMNS / LANE, PITCH = UNITS * 16, SLOTS = UNITS;
    static constexpr int X_BYTES = TOKENS * TILE_ROW_BYTES, STAGE_BYTES = X_BYTES + ROWS * PITCH;
    static constexpr int SCALE_BYTES = SLOTS * ROWS * int(sizeof(TileScale));
    // In front of the stages: barriers, and where sums become rows of y while the next tile's stages come.
    static constexpr int MOST = 16, BARRIER_BYTES = 2 * MOST * int(sizeof(Barrier));
    static constexpr int STORE_TILES = 2, STORE_BYTES = STORE_TILES * 8 * (ROWS + 4) * 4;
    static constexpr int ROW_BYTES = 2 * ROWS * int(sizeof(float));  // a factor and a bias each
    static constexpr int HEAD = (BARRIER_BYTES + ROW_BYTES + STORE_BYTES + 1023) / 1024 * 1024;
    static constexpr int FIT = (227 * 1024 - HEAD) / (STAGE_BYTES + SCALE_BYTES);
    static constexpr int STAGES = FIT < MOST ? FIT : MOST;
    static constexpr int BYTES = HEAD + STAGES * (STAGE_BYTES + SCALE_BYTES);
    static_assert(STAGES >= 4 && STAGE_BYTES % 1024 == 0, "");

    static LLMKERN_DEVICE Barrier* full(int at) { return reinterpret_cast<Barrier*>(shared_memory()) + at; }
    static LLMKERN_DEVICE Barrier* empty(int at) { return full(MOST + at); }
    static LLMKERN_DEVICE float* factors() { return reinterpret_cast<float*>(shared_memory() + BARRIER_BYTES); }
    static LLMKERN_DEVICE float* biases() { return factors() + ROWS; }
    static LLMKERN_DEVICE float* store_place() { return biases() + ROWS; }
    static LLMKERN_DEVICE uint8_t* x(int at) { return shared_memory() + HEAD + at * STAGE_BYTES; }
    static LLMKERN_DEVICE uint8_t* codes(int at) { return x(at) + X_BYTES; }
    static LLMKERN_DEVICE TileScale* scales(int at) {
        return reinterpret_cast<TileScale*>(shared_memory() + HEAD + STAGES * STAGE_BYTES) + at * SLOTS * ROWS;
    }
    // Where 16 bytes of a row's codes stand among those of a stage: lanes that read words of eight rows touch all
    // banks.
    static LLMKERN_DEVICE int code_unit(int row, int unit) {
        return row * PITCH + (unit ^ (row * PITCH / 128 & (UNITS - 1))) * 16;
    }
    static LLMKERN_DEVICE bool one_scale(const TileArgs& args) {  // for a row of a stage
        return args.groups <= 1 || args.group_units.divisor % SLOTS == 0;
    }

    // A stage after the other.
    struct Cursor {
        int at = 0;
        uint32_t round = 0;  // its parity
        LLMKERN_DEVICE void next() {
            if (++at == STAGES) at = 0, round ^= 1;
        }
        LLMKERN_DEVICE void wait_full() const { barrier_wait(full(at), round); }
        LLMKERN_DEVICE void wait_empty() const { barrier_wait(empty(at), round ^ 1); }
    };
    static LLMKERN_DEVICE void arrive(Barrier* barrier) {  // a warp
        sync_warp();
        if (thread() % 32 == 0) barrier_arrive(barrier);
    }
    // By a warp of the users.
    static LLMKERN_DEVICE void release(int at, bool here) {
        sync_warp();
        const bool speaks = here && thread() % 32 == 0;
        if (BLOCKS > 1) {
            barrier_arrive_at_if(speaks, empty(at), 0);
            barrier_arrive_at_if(speaks, empty(at), 1);
        } else {
            barrier_arrive_if(speaks, empty(at));
        }
    }

    static LLMKERN_DEVICE void init(int filled_by) {
        if (thread() == 0)
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full(i), filled_by);
                barrier_init(empty(i), BLOCKS * USERS / 32);
            }
        fence_barriers();
        BLOCKS > 1 ? sync_cluster() : sync_block();
    }
};

// A tile of y: its first row of w, its first row of x and how many there are, the stages of K that are this block's.
struct WgmmaPart {
    int first_row, first_token, tokens, first, last;

    // Tiles that are done at about the same time are of up to 8 * TOKENS rows of x and as many of w, so that both come
    // from L2 for most of them.
    template <class Ring>
    static LLMKERN_DEVICE WgmmaPart of(const WgmmaArgs& args, int tile, int split) {
        constexpr int SIDE = 8, TOKENS = Ring::TOKENS;
        const int strip = tile / (SIDE * args.row_blocks), in = tile % (SIDE * args.row_blocks);
        const int width = smaller(args.token_blocks - strip * SIDE, SIDE);
        const int stages = (args.tile.k + TILE_COLUMNS - 1) / TILE_COLUMNS;
        const int first_token = (strip * SIDE + in % width) * TOKENS;
        const int row_block = in / width * Ring::BLOCKS + block_x() % Ring::BLOCKS;
        return {row_block * Ring::ROWS, first_token, smaller(int(args.tile.out.m) - first_token, TOKENS),
                int(int64_t(stages) * split / args.tile.splits), int(int64_t(stages) * (split + 1) / args.tile.splits)};
    }
};

}  // namespace llmkern::cuda
