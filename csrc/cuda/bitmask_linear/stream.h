// Few rows of x: a block has 16 rows of w and TOKEN_TILES * 8 rows of x; its warps and the blocks of its cluster divide
// K in pieces, since a piece's first value is found by counting the bits before it.
#pragma once

#include "cuda/bitmask_linear/masked_rows.h"

namespace llmkern::cuda {

constexpr int MASK_WARPS = 8;
constexpr int MASK_STREAM_SHARED = MASK_WARPS * MASK_TILE_BYTES + 2 * MASK_WARPS * 16 * int(sizeof(int));

template <class Value, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
struct MaskStream {
    using Rows = MaskedRows<Value, T, SCALED, ALIGNED>;
    using X = uint32_t[TOKEN_TILES][8];  // of a chunk: 16 columns of a lane

    const MaskedArgs& args;
    Rows rows;
    const int64_t first_token;
    const int warp = thread() / 32, g = thread() % 32 / 4, c = thread() % 4;
    float acc[1][TOKEN_TILES][4] = {};

    LLMKERN_DEVICE MaskStream(const MaskedArgs& args, int64_t first_row, int64_t first_token)
        : args(args), rows(args, first_row), first_token(first_token) {}

    LLMKERN_DEVICE void load_x(X& to, int chunk) const {
        const int column = chunk * MASK_CHUNK + 16 * c;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            const int64_t token = first_token + 8 * t + g;
            const uint16_t* const row = static_cast<const uint16_t*>(args.x) + token * args.k;
#pragma unroll
            for (int i = 0; i < 16; i += 8) {
                const Words4 v = token < args.out.m ? load_halves<ALIGNED>(row, column + i, args.k) : Words4{};
#pragma unroll
                for (int j = 0; j < 4; j++) to[t][i / 2 + j] = v.w[j];
            }
        }
    }

    // Bits set before this warp's piece: every warp counts its own and a share of what the blocks before this one have.
    LLMKERN_DEVICE int count_before(int block_begin, int begin, int end) const {
        int* const counts = reinterpret_cast<int*>(shared_memory() + MASK_WARPS * MASK_TILE_BYTES);
        const int share = (block_begin + MASK_WARPS - 1) / MASK_WARPS;
        const int own = rows.count(begin, end);
        const int others = rows.count(smaller(warp * share, block_begin), smaller((warp + 1) * share, block_begin));
        if (rows.half == 0) {
            counts[warp * 16 + rows.lane] = own;
            counts[(MASK_WARPS + warp) * 16 + rows.lane] = others;
        }
        sync_block();
        int sum = 0;
#pragma unroll
        for (int w = 0; w < MASK_WARPS; w++)
            sum += counts[(MASK_WARPS + w) * 16 + rows.lane % 16] + (w < warp ? counts[w * 16 + rows.lane % 16] : 0);
        return sum;
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + MASK_CHUNK - 1) / MASK_CHUNK;
        const int piece = (chunks + MASK_WARPS * args.splits - 1) / (MASK_WARPS * args.splits);
        const int block_begin = smaller(split * MASK_WARPS * piece, chunks);
        const int begin = smaller(block_begin + warp * piece, chunks), end = smaller(begin + piece, chunks);
        uint8_t* const tile = shared_memory() + warp * MASK_TILE_BYTES;
        rows.start(begin, count_before(block_begin, begin, end));
        X next;
        rows.load(begin);
        load_x(next, begin);
        for (int chunk = begin; chunk < end; chunk++) {
            X x;
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 8; i++) x[t][i] = next[t][i];
            rows.expand(tile, chunk);
            rows.load(chunk + 1);  // beyond the piece too: never used
            load_x(next, chunk + 1);
            sync_warp();
            uint32_t a[4][4];
            rows.factors(tile, a);
#pragma unroll
            for (int s = 0; s < 4; s++)
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++) mma<T>(acc[0][t], a[s], x[t][2 * s], x[t][2 * s + 1]);
            sync_warp();
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float scale = rows.scale_of_sums(h);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++) acc[0][t][2 * h] *= scale, acc[0][t][2 * h + 1] *= scale;
        }
        sync_block();  // the sums lie where the tiles did
        reduce_and_store<T, 1, TOKEN_TILES, MASK_WARPS>(acc, args.out, rows.first_row, first_token, split, args.splits);
    }
};

template <class Value, class T, int TOKEN_TILES, Scaled SCALED, bool ALIGNED>
__global__ void __launch_bounds__(MASK_WARPS * 32) mask_stream_kernel(MaskedArgs args) {
    MaskStream<Value, T, TOKEN_TILES, SCALED, ALIGNED> stream(args, int64_t(block_x()) * 16,
                                                              int64_t(block_z()) * TOKEN_TILES * 8);
    stream.run(block_y());
}

}  // namespace llmkern::cuda
