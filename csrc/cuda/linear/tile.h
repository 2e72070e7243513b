// Many rows of x with mma, on every machine: w as the left factor (16 rows), x as the right one (8 rows of x).
//
//   a block   ROW_WARPS * ROW_TILES * 16 rows of w, up to TOKEN_TILES * 8 rows of x; its other warps divide K (PARTS)
//   a warp    ROW_TILES * 16 rows and all of the block's rows of x, so that no weight is decoded twice
//   a part    64 columns: lane c of four takes 16 columns of a row, in two units of 8. Columns meet in a product by
//             lanes, so it is as good as any order, and x is read 16 bytes at a time without conflicts: lanes of rows
//             r and r + 1 read the units 2c + s and, by the swizzle, (2c + s) ^ 1.
//
// Per part, a warp reads TOKEN_TILES KiB of x from shared memory for ROW_TILES * TOKEN_TILES * 4 products. An SM reads
// 128 bytes and does 1024 multiplications (half a product) in a clock (sm_80), so ROW_TILES = 1 is at the balance of
// both and 2 has half of the reads to spare. Decoding takes about 5 operations for a pair: 20 for a row tile's product,
// beside TOKEN_TILES products of 8 clocks each.
#pragma once

#include "cuda/linear/tile_feed.h"

namespace llmkern::cuda {

template <class Format, class T, int ROW_WARPS, int ROW_TILES, int TOKEN_TILES, int PARTS, int STAGES>
struct Tile {
    static constexpr int ROWS = ROW_WARPS * ROW_TILES * 16, TOKENS = TOKEN_TILES * 8;
    static constexpr int THREADS = ROW_WARPS * PARTS * 32;
    static constexpr int LANE_WORDS = TILE_COLUMNS / Format::LANE_COLUMNS, UNIT_WORDS = LANE_WORDS / 2;
    using Feed = TileFeed<Format, T, ROWS, TOKENS, PARTS, STAGES, THREADS>;
    using Store = TileStore<T, ROWS, PARTS, THREADS>;
    static constexpr int BYTES = Feed::BYTES > Store::BYTES ? Feed::BYTES : Store::BYTES;
    // Two blocks, if shared memory of sm_80 takes them: registers for three would spill.
    static constexpr int FIT = 164 * 1024 / (BYTES + 1024), BLOCKS = FIT < 2 ? FIT : 2;
    static_assert(BYTES <= 99 * 1024, "more than a block of sm_86, sm_89 and sm_120 can have");

    const TileArgs& args;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int row_warp = thread() / 32 % ROW_WARPS, part = thread() / 32 / ROW_WARPS;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};

    explicit LLMKERN_DEVICE Tile(const TileArgs& args) : args(args) {}

    LLMKERN_DEVICE int row_of(int r) const { return (row_warp * ROW_TILES + r) * 16; }

    template <int TILES>  // of x
    LLMKERN_DEVICE void multiply(const Feed& feed, int stage) {
        uint32_t words[ROW_TILES][2][LANE_WORDS];
        TileScale scales[ROW_TILES][2];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = row_of(r) + 8 * h + g;
                const uint8_t* const at =
                    feed.codes(stage, part) + Feed::code_unit(row, c * LANE_WORDS / 4) + c * LANE_WORDS % 4 * 4;
                load_words(words[r][h], at);
                scales[r][h] = feed.scale_of(stage, part, row, 16 * c);
            }
#pragma unroll
        for (int s = 0; s < 2; s++) {
            uint32_t pairs[ROW_TILES][2][4];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const uint32_t pair = Format::template neighbours<T>(
                            words[r][h][s * UNIT_WORDS + i / Format::PAIRS],
                            Format::neighbour_selector(i % Format::PAIRS), scales[r][h].offset);
                        pairs[r][h][i] = fma2<T>(pair, scales[r][h].scale, MINUS_ZERO);
                    }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const Words4 x = *reinterpret_cast<const Words4*>(feed.x(stage, part) + swizzled(8 * t + g, 2 * c + s));
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const uint32_t a[4] = {pairs[r][0][i], pairs[r][1][i], pairs[r][0][i + 1], pairs[r][1][i + 1]};
                        mma<T>(acc[r][t], a, x.w[i], x.w[i + 1]);
                    }
            }
        }
    }

    static LLMKERN_DEVICE void load_words(uint32_t (&words)[2], const uint8_t* at) {
        const Words2 v = *reinterpret_cast<const Words2*>(at);
        words[0] = v.w[0], words[1] = v.w[1];
    }
    static LLMKERN_DEVICE void load_words(uint32_t (&words)[4], const uint8_t* at) {
        const Words4 v = *reinterpret_cast<const Words4*>(at);
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = v.w[i];
    }

    LLMKERN_DEVICE void run(int64_t first_row, int64_t first_token, int split) {
        // Fewer rows of x than there is room for: two sizes below the whole, so that what is left over stays small.
        constexpr int FEW = TOKEN_TILES * 5 / 8, MOST = TOKEN_TILES * 3 / 4;
        Feed feed(args, first_row, first_token, split);
        const int tiles = (feed.tokens + 7) / 8;
        feed.start();
        for (int stage = feed.first; stage < feed.last; stage++) {
            feed.arrive(stage);
            feed.ask(stage);
            if (tiles <= FEW)
                multiply<FEW>(feed, stage);
            else if (tiles <= MOST)
                multiply<MOST>(feed, stage);
            else
                multiply<TOKEN_TILES>(feed, stage);
        }
        Store::run(acc, args, first_row, first_token, feed.tokens, split, part, [this](int r) { return row_of(r); });
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) tile_kernel(TileArgs args) {
    Tile tile(args);
    tile.run(int64_t(block_x()) * Tile::ROWS, int64_t(block_z()) * args.tokens, block_y());
}

}  // namespace llmkern::cuda
