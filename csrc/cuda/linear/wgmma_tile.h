// Many rows of x with wgmma (sm_90a): a warpgroup multiplies ROW_TILES * 64 rows of w, decoded to registers, with
// TOKENS rows of x in shared memory. While the tensor cores do one step (16 columns of K), the next one is decoded.
//
// A block has two warpgroups. Lane c of four needs the columns 2c, 2c + 1 of each unit of 8, so all four read the same
// codes, and each takes its own byte (int4) or two (int8). For 256 rows and 128 rows of x a step is 4 instructions of
// 64 clocks; in these 256 clocks shared memory gives x 4 times (128 clocks of 128 bytes) and the codes (at most 64),
// and takes what comes from L2: 4 KiB of x, 2 KiB of int4 codes (48). From L2, 24 bytes in a clock.
#pragma once

#include "cuda/common/wgmma.h"
#include "cuda/linear/tile_feed.h"

namespace llmkern::cuda {

template <class Format, class T, int ROW_TILES, int TOKENS>
struct WgmmaTile {
    static constexpr int ROWS = ROW_TILES * 128, THREADS = 256, STEPS = TILE_COLUMNS / 16;
    static constexpr bool INT4 = Format::LANE_COLUMNS == 32;
    // int8: rows 20 words apart, so that the words that lanes read of eight rows are in different banks.
    static constexpr int PITCH = INT4 ? 32 : 80;
    // Small tiles leave room for a second block, which multiplies while the first one waits for its stage.
    static constexpr int BLOCKS = ROW_TILES == 1 ? 2 : 1, BUDGET = (ROW_TILES == 1 ? 112 : 224) * 1024;
    static constexpr int SCALES = 2 * ROWS * (TILE_COLUMNS / Format::LANE_COLUMNS) * int(sizeof(TileScale));
    static constexpr int FIT = (BUDGET - SCALES) / (TOKENS * TILE_ROW_BYTES + ROWS * PITCH);
    static constexpr int STAGES = FIT < 8 ? FIT : 8;
    static_assert(STAGES >= 4, "too little under way");
    // A stage's last products are under way when the next stage begins.
    using Feed = TileFeed<Format, T, ROWS, TOKENS, 1, PITCH, STAGES, STAGES - 2, THREADS>;
    using Store = TileStore<T, ROWS, 1, THREADS>;
    static constexpr int BYTES = Feed::BYTES > Store::BYTES ? Feed::BYTES : Store::BYTES;
    using Left = uint32_t[ROW_TILES][4];

    const TileArgs& args;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int warpgroup = thread() / 128, warp = thread() / 32 % 4;
    const uint32_t selector = Format::neighbour_selector(c % Format::PAIRS);
    float acc[ROW_TILES][TOKENS / 8][4] = {};
    Words4 words[ROW_TILES][2];  // int4: of two steps
    TileScale scales[ROW_TILES][2];

    explicit LLMKERN_DEVICE WgmmaTile(const TileArgs& args) : args(args) {}

    LLMKERN_DEVICE int row_of(int r) const { return (warpgroup * ROW_TILES + r) * 64 + warp * 16; }

    LLMKERN_DEVICE void decode(Left& left, const Feed& feed, int stage, int step) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = row_of(r) + 8 * h + g;
                if (step == 0 || (!feed.wide && step * 16 % Format::LANE_COLUMNS == 0))
                    scales[r][h] = feed.scale_of(stage, 0, row, step * 16);
                const uint8_t* const at = feed.codes(stage, 0) + row * PITCH;
                uint32_t unit[2];
                if (INT4) {
                    if (step % 2 == 0) words[r][h] = *reinterpret_cast<const Words4*>(at + step * 8);
                    unit[0] = words[r][h].w[step % 2 * 2], unit[1] = words[r][h].w[step % 2 * 2 + 1];
                } else {
                    const uint32_t* const step_words = reinterpret_cast<const uint32_t*>(at + step * 16) + c / 2;
                    unit[0] = step_words[0], unit[1] = step_words[2];
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair = Format::template neighbours<T>(unit[i], selector, scales[r][h].offset);
                    left[r][2 * i + h] = fma2<T>(pair, scales[r][h].scale, MINUS_ZERO);
                }
            }
    }

    LLMKERN_DEVICE void run(int64_t first_row, int64_t first_token, int split) {
        Feed feed(args, first_row, first_token, split);
        const auto fence = [] { fence_async(); };
        Left left[2];  // of the step under way, of the next one
        feed.start();
        if (feed.first < feed.last) {
            feed.arrive(feed.first, fence);
            decode(left[0], feed, feed.first, 0);
        }
        for (int stage = feed.first; stage < feed.last; stage++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const uint64_t x = describe(feed.x(stage, 0), step * 32);
                wgmma_fence();
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) wgmma<T, TOKENS>(acc[r], left[step % 2][r], x);
                wgmma_commit();
                if (step == 0) feed.ask(stage);  // behind the products of this step
                wgmma_wait<1>();  // the step before: its registers are free, and with its last step a stage is
                if (step + 1 < STEPS) {
                    decode(left[(step + 1) % 2], feed, stage, step + 1);
                } else if (stage + 1 < feed.last) {
                    feed.arrive(stage + 1, fence);
                    decode(left[0], feed, stage + 1, 0);
                }
            }
        }
        wgmma_wait<0>();
        Store::run(acc, args, first_row, first_token, feed.tokens, split, 0, [this](int r) { return row_of(r); });
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) wgmma_kernel(TileArgs args) {
#if LLMKERN_HAS_WGMMA
    Tile tile(args);
    tile.run(int64_t(block_x()) * Tile::ROWS, int64_t(block_z()) * args.tokens, block_y());
#endif
}

}  // namespace llmkern::cuda
