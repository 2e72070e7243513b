// Few rows of x: weights go from memory to the registers that a product wants, in the canonical layout, and nowhere in
// between. What counts is bytes on their way, so every warp has DEPTH pieces of its rows asked for at any time.
//
//   a block     ROW_TILES * 16 rows of w, TOKEN_TILES * 8 rows of x; its WARPS and the blocks of its cluster divide K
//   a chunk     64 bytes of a row, 16 for each of four lanes: 128 columns of int4, 64 of int8
//   a product   w as the left factor (16 rows), x as the right one (8 rows of x), see codes.h for the columns
//
// x comes straight from memory too (L2 and L1 after the first reader): lane 4g + c needs row g, and just the columns of
// its own bytes of w.
#pragma once

#include "cuda/common/divisor.h"
#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/codes.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

struct StreamArgs {
    const void* x;
    const uint8_t* codes;
    int row_bytes;
    const void* scales;
    DType scales_dtype;
    const int8_t* zeros;
    int groups;
    Divisor group_size;
    int k;
    int splits;
    Output out;
};

constexpr int STREAM_WARPS = 8;

// FINE: groups smaller than a chunk, whose scales multiply the weights (in T); otherwise they multiply the sums of a
// chunk (in fp32). ALIGNED: rows of x and w start at multiples of 16 bytes.
template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int DEPTH, bool FINE, bool ALIGNED>
struct Stream {
    static constexpr int LANE = Format::LANE_COLUMNS, CHUNK = 4 * LANE, PAIRS = Format::PAIRS;
    static constexpr int HALF_PAIRS = LANE / 4;  // of x, for half of the chunk: two words of w

    // Nothing is computed from what is on its way: that would wait for it.
    struct Stage {
        Words4 w[ROW_TILES][2];
        uint32_t scale[ROW_TILES][2];
    };
    using Half = uint32_t[TOKEN_TILES][HALF_PAIRS];

    const StreamArgs& args;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int first_row;
    const int64_t first_token;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    Half x[2];  // of a chunk: while one is used, the next one is on its way
    int zero[ROW_TILES][2] = {};

    const uint8_t* const codes_at;      // of this lane's first row, its part of the first chunk
    const uint16_t* x_at[TOKEN_TILES];  // this lane's rows of x

    LLMKERN_DEVICE Stream(const StreamArgs& args, int first_row, int64_t first_token)
        : args(args),
          first_row(first_row),
          first_token(first_token),
          codes_at(args.codes + int64_t(row(0, 0)) * args.row_bytes + c * 16) {
        // Rows of x beyond the last are read as the last one, which is in L1 anyway: nobody stores what comes of them.
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            const int64_t token = smaller<int64_t>(first_token + 8 * t + g, args.out.m - 1);
            x_at[t] = static_cast<const uint16_t*>(args.x) + token * args.k;
        }
    }

    LLMKERN_DEVICE Words4 load_codes(int tile, int half, int chunk) const {
        const int byte = chunk * 64 + c * 16;
        const uint8_t* const at = codes_at + (int64_t(row(tile, half) - row(0, 0)) * args.row_bytes + chunk * 64);
        if (ALIGNED) return byte < args.row_bytes ? load_once(at) : Words4{};
        Words4 v{};
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (byte + i < args.row_bytes) v.w[i / 4] |= uint32_t(at[i]) << i % 4 * 8;
        return v;
    }

    LLMKERN_DEVICE void load_x(Half& to, int chunk, int half) const {
        const int column = chunk * CHUNK + c * LANE + half * LANE / 2;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
#pragma unroll
            for (int i = 0; i < HALF_PAIRS; i += 4) {
                const Words4 v = load_halves<ALIGNED>(x_at[t], column + 2 * i, args.k);
#pragma unroll
                for (int j = 0; j < 4; j++) to[t][i + j] = v.w[j];
            }
        }
    }

    LLMKERN_DEVICE int group_of(int chunk) const {
        return args.group_size.divide(smaller(chunk * CHUNK + c * LANE, args.k - 1));
    }

    // Row of w of this lane's part of a tile. ALIGNED: the last block starts early enough to be whole, so some rows are
    // computed twice; otherwise the last row stands for those beyond it, and nobody stores them.
    LLMKERN_DEVICE int row(int tile, int half) const {
        const int mine = first_row + 16 * tile + 8 * half + g;
        return ALIGNED ? mine : smaller(mine, int(args.out.n) - 1);
    }

    LLMKERN_DEVICE void load(Stage& stage, int chunk) const {
        const int group = group_of(chunk);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                stage.w[r][h] = load_codes(r, h, chunk);
                stage.scale[r][h] = load_bits(args.scales, row(r, h) * args.groups + group, args.scales_dtype);
            }
    }

    // One chunk ahead: a row's zeros are so few bytes that all but the first come from L1.
    LLMKERN_DEVICE void load_zeros(int (&to)[ROW_TILES][2], int chunk) const {
        const int group = group_of(chunk);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) to[r][h] = args.zeros[row(r, h) * args.groups + group];
    }

    // Two words of w; `into`: the sums.
    LLMKERN_DEVICE void multiply_half(const Stage& stage, const Half& half, int first_word,
                                      float (&into)[ROW_TILES][TOKEN_TILES][4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t b[TOKEN_TILES][PAIRS];
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++) {
#pragma unroll
                for (int j = 0; j < PAIRS; j++) b[t][j] = half[t][i * PAIRS + j];
                Format::arrange(b[t]);
            }
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                uint32_t pairs[2][PAIRS];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const auto offset = Format::template offset<T>(zero[r][h]);
                    Format::template decode<T>(stage.w[r][h].w[first_word + i], offset, pairs[h]);
                    if (FINE) {
                        const float value = bits_to_float(stage.scale[r][h], args.scales_dtype);
                        const uint32_t scale = pack2<T>(value, value);
#pragma unroll
                        for (int j = 0; j < PAIRS; j++) pairs[h][j] = fma2<T>(pairs[h][j], scale, MINUS_ZERO);
                    }
                }
#pragma unroll
                for (int j = 0; j < PAIRS; j += 2) {
                    const uint32_t a[4] = {pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1]};
#pragma unroll
                    for (int t = 0; t < TOKEN_TILES; t++) mma<T>(into[r][t], a, b[t][j], b[t][j + 1]);
                }
            }
        }
    }

    LLMKERN_DEVICE void multiply(const Stage& stage, int chunk, int next) {
        float sums[ROW_TILES][TOKEN_TILES][4] = {};
        auto& into = FINE ? acc : sums;
        int next_zero[ROW_TILES][2];
        if (args.zeros) load_zeros(next_zero, next);
        load_x(x[1], chunk, 1);
        multiply_half(stage, x[0], 0, into);
        load_x(x[0], next, 0);
        multiply_half(stage, x[1], 2, into);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (args.zeros) zero[r][h] = next_zero[r][h];
        if (!FINE) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        acc[r][t][i] += bits_to_float(stage.scale[r][i / 2], args.scales_dtype) * sums[r][t][i];
        }
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + CHUNK - 1) / CHUNK;
        const int step = STREAM_WARPS * args.splits;
        const int first = split * STREAM_WARPS + thread() / 32;
        if (ALIGNED && c == 0) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
#pragma unroll
                for (int r = 0; r < 2 * ROW_TILES; r++)
                    if (first + d * step < chunks)
                        prefetch_l2(codes_at + (int64_t(8 * r) * args.row_bytes + (first + d * step) * 64));
        }
        dependency_wait();
        Stage stages[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (first + d * step < chunks) load(stages[d], first + d * step);
        load_x(x[0], first, 0);
        if (args.zeros) load_zeros(zero, first);
        for (int chunk = first; chunk < chunks; chunk += DEPTH * step)
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (chunk + d * step < chunks) multiply(stages[d], chunk + d * step, chunk + (d + 1) * step);
                if (chunk + (d + DEPTH) * step < chunks) load(stages[d], chunk + (d + DEPTH) * step);
            }
        reduce_and_store<T, ROW_TILES, TOKEN_TILES, STREAM_WARPS>(acc, args.out, first_row, first_token, split,
                                                                  args.splits);
    }
};

template <class Format, class T, int ROW_TILES, int TOKEN_TILES, int DEPTH, bool FINE, bool ALIGNED>
__global__ void __launch_bounds__(STREAM_WARPS * 32, ROW_TILES > 2 ? 1 : 2) stream_kernel(StreamArgs args) {
    Stream<Format, T, ROW_TILES, TOKEN_TILES, DEPTH, FINE, ALIGNED> stream(args, block_x() * ROW_TILES * 16,
                                                                           int64_t(block_z()) * TOKEN_TILES * 8);
    stream.run(block_y());
}

}  // namespace llmkern::cuda
