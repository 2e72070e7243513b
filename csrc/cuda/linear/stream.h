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
    int group_size;
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

    struct Stage {
        Words4 w[ROW_TILES][2];
        float scale[ROW_TILES][2];
        uint32_t zeros[(ROW_TILES + 1) / 2];  // a byte for each row
    };
    using Half = uint32_t[TOKEN_TILES][HALF_PAIRS];

    const StreamArgs& args;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int first_row;
    const int64_t first_token;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    Half x[2];  // of a chunk: while one is used, the next one is on its way

    LLMKERN_DEVICE Stream(const StreamArgs& args, int first_row, int64_t first_token)
        : args(args), first_row(first_row), first_token(first_token) {}

    LLMKERN_DEVICE Words4 load_codes(int row, int byte) const {
        if (ALIGNED) {
            const unsigned sixteenth = unsigned(row) * unsigned(args.row_bytes / 16) + byte / 16;  // 32 bits are enough
            return byte < args.row_bytes ? load_once(args.codes + size_t(sixteenth) * 16) : Words4{};
        }
        const uint8_t* const at = args.codes + row * int64_t(args.row_bytes) + byte;
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
            const int64_t token = first_token + 8 * t + g;
            const uint16_t* const at = static_cast<const uint16_t*>(args.x) + token * args.k + column;
#pragma unroll
            for (int i = 0; i < HALF_PAIRS; i += 4) {
                Words4 v{};
                if (ALIGNED) {
                    if (token < args.out.m && column + 2 * i < args.k) v = load_shared_use(at + 2 * i);
                } else {
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        if (token < args.out.m && column + 2 * i + j < args.k)
                            v.w[j / 2] |= uint32_t(at[2 * i + j]) << j % 2 * 16;
                }
#pragma unroll
                for (int j = 0; j < 4; j++) to[t][i + j] = v.w[j];
            }
        }
    }

    LLMKERN_DEVICE void load(Stage& stage, int chunk) const {
        const int column = chunk * CHUNK + c * LANE, byte = chunk * 64 + c * 16;
        const int group = smaller(column, args.k - 1) / args.group_size;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            if (r % 2 == 0) stage.zeros[r / 2] = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = smaller(first_row + 16 * r + 8 * h + g, int(args.out.n) - 1);
                const int at = row * args.groups + group;
                stage.w[r][h] = load_codes(row, byte);
                stage.scale[r][h] = load_float(args.scales, at, args.scales_dtype);
                if (args.zeros) stage.zeros[r / 2] |= uint32_t(uint8_t(args.zeros[at])) << (r % 2 * 16 + h * 8);
            }
        }
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
                    const int zero = int8_t(stage.zeros[r / 2] >> (r % 2 * 16 + h * 8));
                    const auto offset = Format::template offset<T>(zero);
                    Format::template decode<T>(stage.w[r][h].w[first_word + i], offset, pairs[h]);
                    if (FINE) {
                        const uint32_t scale = pack2<T>(stage.scale[r][h], stage.scale[r][h]);
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
        load_x(x[1], chunk, 1);
        multiply_half(stage, x[0], 0, into);
        load_x(x[0], next, 0);
        multiply_half(stage, x[1], 2, into);
        if (!FINE) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[r][t][i] += stage.scale[r][i / 2] * sums[r][t][i];
        }
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + CHUNK - 1) / CHUNK;
        const int step = STREAM_WARPS * args.splits;
        const int first = split * STREAM_WARPS + thread() / 32;
        Stage stages[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (first + d * step < chunks) load(stages[d], first + d * step);
        load_x(x[0], first, 0);
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
__global__ void __launch_bounds__(STREAM_WARPS * 32) stream_kernel(StreamArgs args) {
    Stream<Format, T, ROW_TILES, TOKEN_TILES, DEPTH, FINE, ALIGNED> stream(args, block_x() * ROW_TILES * 16,
                                                                           int64_t(block_z()) * TOKEN_TILES * 8);
    stream.run(block_y());
}

}  // namespace llmkern::cuda
