// More rows of x: a block has 128 rows of w, 16 for each warp, and TOKEN_TILES * 8 rows of x, which go through shared
// memory, STAGES chunks at a time. The blocks of a cluster divide K in pieces.
//
// A row of x has eight segments of 16 bytes in a chunk; those of every second row are swapped in pairs, so that the
// lanes of two rows, each at every second segment, are in different banks.
#pragma once

#include "cuda/bitmask_linear/masked_rows.h"
#include "cuda/linear/store_tile.h"

namespace llmkern::cuda {

template <class Value, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
struct MaskTile {
    using Rows = MaskedRows<Value, T, SCALED, ALIGNED>;
    static constexpr int WARPS = 8, THREADS = 32 * WARPS, STAGES = 3;
    static constexpr int ROWS = 16 * WARPS, TOKENS = 8 * TOKEN_TILES, STAGE_BYTES = TOKENS * 128;
    static constexpr int SUMS_BYTES = tile_floats<ROWS, TOKENS> * int(sizeof(float));
    static constexpr int OPERANDS_BYTES = STAGES * STAGE_BYTES + WARPS * MASK_TILE_BYTES;
    static constexpr int SHARED = OPERANDS_BYTES > SUMS_BYTES ? OPERANDS_BYTES : SUMS_BYTES;

    const MaskedArgs& args;
    const int64_t first_row, first_token;
    const int warp = thread() / 32, g = thread() % 32 / 4, c = thread() % 4;
    Rows rows{args, first_row + 16 * warp};
    float acc[1][TOKEN_TILES][4] = {};

    LLMKERN_DEVICE MaskTile(const MaskedArgs& args, int64_t first_row, int64_t first_token)
        : args(args), first_row(first_row), first_token(first_token) {}

    LLMKERN_DEVICE void copy_x(int stage, int chunk) const {
        constexpr int STEP = THREADS / 8;
        const int first = thread() / 8, segment = thread() % 8;
        uint8_t* const to = shared_memory() + stage * STAGE_BYTES + first * 128 + (segment ^ first % 2) * 16;
        const int column = chunk * MASK_CHUNK + 8 * segment;
        const int rows = column < args.k ? int(smaller<int64_t>(args.out.m - first_token, TOKENS)) : 0;
        const uint16_t* const from = static_cast<const uint16_t*>(args.x) + (first_token + first) * args.k + column;
#pragma unroll
        for (int i = 0; i < TOKENS; i += STEP) {
            const bool inside = first + i < rows;
            if (ALIGNED) {
                copy_async(to + i * 128, inside ? static_cast<const void*>(from + int64_t(i) * args.k) : args.x,
                           inside ? 16 : 0);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    reinterpret_cast<uint16_t*>(to + i * 128)[j] =
                        inside && column + j < args.k ? from[int64_t(i) * args.k + j] : 0;
            }
        }
    }

    LLMKERN_DEVICE void multiply(const uint8_t* tile, int stage) {
        uint32_t a[4][4];
        rows.factors(tile, a);
        const uint8_t* const x = shared_memory() + stage * STAGE_BYTES + g * 128;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const Words4 b = *reinterpret_cast<const Words4*>(x + t * 1024 + ((2 * c + u) ^ g % 2) * 16);
                mma<T>(acc[0][t], a[2 * u], b.w[0], b.w[1]);
                mma<T>(acc[0][t], a[2 * u + 1], b.w[2], b.w[3]);
            }
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + MASK_CHUNK - 1) / MASK_CHUNK;
        const int piece = (chunks + args.splits - 1) / args.splits;
        const int begin = smaller(split * piece, chunks), end = smaller(begin + piece, chunks);
        uint8_t* const tile = shared_memory() + STAGES * STAGE_BYTES + warp * MASK_TILE_BYTES;
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) {
            if (begin + i < end) copy_x(i, begin + i);
            copy_async_commit();
        }
        rows.start(begin, rows.count(0, begin));
        rows.load(begin);
        for (int i = 0; i < end - begin; i++) {
            const int chunk = begin + i;
            rows.expand(tile, chunk);
            rows.load(chunk + 1);  // beyond the piece too: never used
            copy_async_wait<STAGES - 2>();
            sync_block();  // x is there, and nobody reads what the next copy overwrites
            if (chunk + STAGES - 1 < end) copy_x((i + STAGES - 1) % STAGES, chunk + STAGES - 1);
            copy_async_commit();
            multiply(tile, i % STAGES);
            sync_warp();
        }
        copy_async_wait<0>();
        sync_block();
        put_tile<ROWS>(acc, 16 * warp, 0);
        const auto scale = [this](int64_t row) {
            return SCALED == Scaled::SUMS ? load_float(args.scales, row, args.scales_dtype) : 1.0f;
        };
        store_tile<T, ROWS, TOKENS, THREADS>(args.out, first_row, first_token, split, args.splits, scale);
    }
};

template <class Value, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
__global__ void __launch_bounds__(256) mask_tile_kernel(MaskedArgs args) {
    using Tile = MaskTile<Value, T, TOKEN_TILES, SCALED, ALIGNED>;
    Tile tile(args, int64_t(block_x()) * Tile::ROWS, int64_t(block_z()) * Tile::TOKENS);
    tile.run(block_y());
}

}  // namespace llmkern::cuda
