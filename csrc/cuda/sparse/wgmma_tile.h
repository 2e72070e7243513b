// Many rows of x and 2:4 weights on sm_90a: the tile of tile.h, multiplied by warpgroups. x lies in shared memory as it
// does there: four segments are 32 columns of a row, and the permutation of segments is the swizzle of 128 bytes.
// Weights are the left factor from registers; the next chunk's are decoded while a chunk's products are under way.
#pragma once

#include "cuda/common/wgmma_sparse.h"
#include "cuda/sparse/tile.h"

namespace llmkern::cuda {

template <class Format>
constexpr int X_STAGES = Format::LANE_COLUMNS == PART_COLUMNS ? 4 : 3;

template <class Format, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
struct SparseWarpgroupTile : SparseTile<Format, T, 1, TOKEN_TILES, 8, 1, SCALED, ALIGNED, X_STAGES<Format>> {
    using Tile = SparseTile<Format, T, 1, TOKEN_TILES, 8, 1, SCALED, ALIGNED, X_STAGES<Format>>;
    using Rows = typename Tile::Rows;
    using Tile::acc, Tile::args, Tile::copy_x, Tile::rows, Tile::PARTS, Tile::TOKENS;

    static constexpr int STAGES = X_STAGES<Format>;

    struct Factors {  // of a chunk; not to be touched while its products are under way
        uint32_t a[PARTS][2][4];
        uint32_t positions[PARTS];
    };

    LLMKERN_DEVICE SparseWarpgroupTile(const SparseArgs& args, int64_t first_row, int64_t first_token)
        : Tile(args, first_row, first_token) {}

    LLMKERN_DEVICE void decode(const typename Rows::Stage& stage, Factors& factors) const {
        Rows::positions(stage, 0, factors.positions);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            rows.factors(stage, 0, part, factors.a[part]);
            if constexpr (std::is_same_v<Format, Kept16>) own_registers(factors.a[part]);
        }
    }

    // Values as they were loaded would be multiplied from the registers of the load, and the next load writes those
    // while products are under way: the compiler sees copies as one register, and asynchronous reads not at all. A
    // product by one is a register of its own.
    static LLMKERN_DEVICE void own_registers(uint32_t (&a)[2][4]) {
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[s][i] = fma2<T>(a[s][i], Magic<T>::ONE, MINUS_ZERO);
    }

    LLMKERN_DEVICE void multiply(const Factors& factors, int x_stage) {
        const uint8_t* const x = shared_memory() + x_stage * Tile::STAGE_BYTES;
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const uint8_t* const at = x + part * Tile::PART_BYTES;
            wgmma_sparse<T, TOKENS, 0>(acc[0], factors.a[part][0], factors.positions[part], describe(at, 0));
            wgmma_sparse<T, TOKENS, 1>(acc[0], factors.a[part][1], factors.positions[part], describe(at, 64));
        }
        wgmma_commit();
    }

    // Without conditions between products, which would keep the compiler from leaving them under way: chunks come in
    // twos, and what lies beyond K is zeros.
    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + Rows::CHUNK - 1) / Rows::CHUNK;
        const int count = (chunks - split + args.splits - 1) / args.splits;
        const auto chunk = [&](int i) { return split + i * args.splits; };
        typename Rows::Stage stages[2];
        Factors factors[2];  // of the chunk under way, of the next one
        if (count > 0) {
#pragma unroll
            for (int i = 0; i < STAGES - 2; i++) {
                copy_x(i, chunk(i));
                copy_async_commit();
            }
            rows.load(stages[0], chunk(0));
            rows.load(stages[1], chunk(1));
            decode(stages[0], factors[0]);
            rows.load(stages[0], chunk(2));
        }
        for (int first = 0; first < count; first += 2)
#pragma unroll
            for (int d = 0; d < 2; d++) {
                const int i = first + d;
                copy_async_wait<STAGES - 3>();
                fence_async();
                sync_block();  // x is there, and every warpgroup is done with the products of i - 2
                multiply(factors[d], i % STAGES);
                copy_x((i + STAGES - 2) % STAGES, chunk(i + STAGES - 2));
                copy_async_commit();
                wgmma_wait<1>();
                decode(stages[1 - d], factors[1 - d]);
                rows.load(stages[1 - d], chunk(i + 3));
            }
        wgmma_wait<0>();
        this->finish(split);
    }
};

template <class Format, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
__global__ void __launch_bounds__(256) sparse_wgmma_kernel(SparseArgs args) {
#if LLMKERN_HAS_WGMMA
    using Tile = SparseWarpgroupTile<Format, T, TOKEN_TILES, SCALED, ALIGNED>;
    Tile tile(args, int64_t(block_x()) * Tile::ROWS, int64_t(block_z()) * Tile::TOKENS);
    tile.run(block_y());
#endif
}

}  // namespace llmkern::cuda
