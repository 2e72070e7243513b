// sm_90a, many rows of quantized x where each row of w has one scale: as integer_wgmma.h, but tiles come by the copy
// engine (tensor_map.h), which one thread asks for, and two warpgroups multiply all the time.
//
//   a block     128 rows of w and 256 of x, or 256 and up to 128; the blocks of its cluster divide K, or
//   PAIRED      two blocks have the same rows of x, of which each brings a half to both: what comes from L2 is what
//               limits large products, 32 KiB for 128 columns then, not 48
#pragma once

#include "cuda/common/tensor_map.h"
#include "cuda/common/wgmma_s8.h"
#include "cuda/linear/integer_tile.h"

namespace llmkern::cuda {

// W_STEP: bytes of a row of w in a step.
template <int ROW_TILES, int TOKENS_, bool PAIRED, int W_STEP = TILE_STEP>
struct IntegerCopied {
    static constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128, ROWS = 128 * ROW_TILES, TOKENS = TOKENS_;
    static constexpr int BLOCKS = PAIRED ? 2 : 1, X_ROWS = TOKENS / BLOCKS;  // of x that a block brings
    static constexpr int W_BYTES = ROWS * W_STEP, STAGE = W_BYTES + TOKENS * TILE_STEP;
    static constexpr int FIT = (226 * 1024 - 256) / STAGE, STAGES = FIT < 8 ? FIT : 8;
    static constexpr int BARRIERS = STAGES * STAGE, ALL = BARRIERS + 2 * STAGES * int(sizeof(Barrier));
    static constexpr int STRIDE = ROWS + 4, SUMS = TOKENS * STRIDE * 4;
    static constexpr int SHARED = ALL > SUMS ? ALL : SUMS;
    static_assert(STAGE % 1024 == 0 && STAGES >= 3, "");

    const IntegerArgs& args;
    const int64_t first_row, first_token;
    int first, last;

    LLMKERN_DEVICE IntegerCopied(const IntegerArgs& args, int64_t first_row, int64_t first_token, int split)
        : args(args), first_row(first_row), first_token(first_token) {
        steps_of(args, split, first, last);
    }

    static LLMKERN_DEVICE uint8_t* stage_at(int slot) { return shared_memory() + slot * STAGE; }
    // The step in a slot is there; it has been used, in all blocks that the next one goes to.
    static LLMKERN_DEVICE Barrier* full(int slot) {
        return reinterpret_cast<Barrier*>(shared_memory() + BARRIERS) + slot;
    }
    static LLMKERN_DEVICE Barrier* empty(int slot) { return full(STAGES + slot); }

    static LLMKERN_DEVICE void init() {
        if (thread() == 0)
            for (int slot = 0; slot < STAGES; slot++) {
                barrier_init(full(slot), 1);
                barrier_init(empty(slot), BLOCKS * CONSUMERS / 32);
            }
        fence_barriers();
        PAIRED ? sync_cluster() : sync_block();
    }

    // By one thread. What of w fits is asked for before x is waited for, which the kernel before this one writes.
    LLMKERN_DEVICE void copy(const TensorMap& w, const TensorMap& x, int rank) const {
        const int early = smaller(first + STAGES, last);
        for (int step = first; step < early; step++) copy_w(w, step);
        dependency_wait();
        for (int step = first; step < early; step++) copy_x(x, step, rank);
        int slot = 0;
        uint32_t parity = 0;
        for (int step = early; step < last; step++) {
            barrier_wait(empty(slot), parity);
            copy_w(w, step);
            copy_x(x, step, rank);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            parity ^= slot == 0;
        }
    }
    LLMKERN_DEVICE void copy_w(const TensorMap& w, int step) const {
        const int slot = (step - first) % STAGES;
        barrier_expect(full(slot), STAGE);
        copy_tile(stage_at(slot), w, step * W_STEP, int(first_row), full(slot));
    }
    LLMKERN_DEVICE void copy_x(const TensorMap& x, int step, int rank) const {
        const int slot = (step - first) % STAGES;
        uint8_t* const to = stage_at(slot) + W_BYTES;
        if (PAIRED)
            copy_tile_to(3, to + rank * X_ROWS * TILE_STEP, x, step * TILE_STEP, int(first_token) + rank * X_ROWS,
                         full(slot));
        else
            copy_tile(to, x, step * TILE_STEP, int(first_token), full(slot));
    }

    static LLMKERN_DEVICE void release(int slot, bool here) {
        sync_warp();
        const bool speaks = here && thread() % 32 == 0;
        if (PAIRED) {
            barrier_arrive_at_if(speaks, empty(slot), 0);
            barrier_arrive_at_if(speaks, empty(slot), 1);
        } else {
            barrier_arrive_if(speaks, empty(slot));
        }
    }

    // Sums to shared memory. A step at least, so that what sets sums to zero does not stand between products.
    LLMKERN_DEVICE void multiply() const {
        const int warpgroup = thread() / 128, g = thread() % 32 / 4, c = thread() % 4;
        int sums[ROW_TILES][TOKENS / 8][4] = {};
        int step = first, slot = 0, before = STAGES - 1;
        uint32_t parity = 0;
        dependency_wait();
#pragma unroll 1
        do {
            barrier_wait(full(slot), parity);
            const uint8_t* const at = stage_at(slot);
            wgmma_fence();
#pragma unroll
            for (int byte = 0; byte < TILE_STEP; byte += 32)
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
                    wgmma_s8<TOKENS>(sums[r], describe(at + (warpgroup * ROW_TILES + r) * 64 * TILE_STEP, byte),
                                     describe(at + W_BYTES, byte));
            wgmma_commit();
            wgmma_wait<1>();
            release(before, step > first);
            before = slot;
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            parity ^= slot == 0;
        } while (++step < last);
        wgmma_wait<0>();
        sync_threads<1, CONSUMERS>();  // all products are done with what stands where sums go
        int* const to = reinterpret_cast<int*>(shared_memory());
        const int row = warpgroup * ROW_TILES * 64 + thread() / 32 % 4 * 16 + g;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    to[(8 * t + 2 * c + i % 2) * STRIDE + row + 64 * r + i / 2 * 8] = sums[r][t][i];
    }
};

// V: of the sums that Tile leaves in shared memory.
template <class Tile, class Format, class V>
LLMKERN_DEVICE void run_copied(const IntegerArgs& args, const TensorMap& w, const TensorMap& x) {
#if LLMKERN_HAS_WGMMA
    int64_t first_row, first_token;
    tile_of<Tile::BLOCKS * Tile::ROWS, Tile::TOKENS>(args.out, block_x() / Tile::BLOCKS, first_row, first_token);
    const int rank = block_x() % Tile::BLOCKS, split = block_y();
    first_row += rank * Tile::ROWS;
    const Tile tile(args, first_row, first_token, split);
    Tile::init();
    if (thread() < Tile::CONSUMERS) {
        more_registers<232>();
        tile.multiply();
        args.splits > 1 ? sync_cluster() : sync_threads<1, Tile::CONSUMERS>();
        store_sums<Format, V, Tile::CONSUMERS, Tile::TOKENS, Tile::ROWS>(args, first_row, first_token, split);
        // Nobody leaves while another reads its memory, or says there that it has used a stage.
        if (Tile::BLOCKS > 1 || args.splits > 1) sync_cluster();
    } else {
        fewer_registers<40>();
        if (thread() == Tile::CONSUMERS) tile.copy(w, x, rank);
    }
#endif
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    integer_copied_kernel(IntegerArgs args, LLMKERN_GRID_CONSTANT TensorMap w, LLMKERN_GRID_CONSTANT TensorMap x) {
    run_copied<Tile, Int8Codes, int>(args, w, x);
}

template <class Tile>
void launch_copied(const char* name, void (*kernel)(IntegerArgs, TensorMap, TensorMap), const IntegerArgs& args,
                   void* stream, int w_step) {
    constexpr int ROWS = Tile::BLOCKS * Tile::ROWS, TOKENS = Tile::TOKENS;
    Grid grid;
    grid.x = unsigned(Tile::BLOCKS * ((args.out.n + ROWS - 1) / ROWS) * ((args.out.m + TOKENS - 1) / TOKENS));
    grid.y = grid.cluster_y = unsigned(args.splits);
    grid.cluster_x = Tile::BLOCKS;
    grid.threads = Tile::THREADS;
    grid.shared_bytes = size_t(Tile::SHARED);
    grid.overlap = true;
    launch(name, kernel, grid, stream, args,
           tensor_map(name, args.codes, args.row_bytes, args.out.n, args.row_bytes, w_step, Tile::ROWS),
           tensor_map(name, args.x_codes, args.padded_k, args.out.m, args.padded_k, TILE_STEP, Tile::X_ROWS));
}

}  // namespace llmkern::cuda
