// Few rows of quantized x: as stream.h, but with products of bytes, whose sums are exact. Codes of w are factors as
// they are stored; zero points are taken off afterwards, times the sum of x's codes, which is one more product, with
// ones as its left factor.
//
// Where x is quantized:
//
//   X_CODES   before, by quantize_kernel: one more launch (2 to 3 us), and then half the bytes of x to read
//   X_ROWS    here: a block finds the largest magnitudes of its rows of x, in its share of K, which the blocks of its
//             cluster put together, while its first weights are on their way. Then a lane quantizes the columns that it
//             multiplies, which no other of the block needs. It reads x twice in each block, so it is for few rows
//             (ops/_cuda.py `quantizes_inside`)
//   X_CHUNKS  here, where x has a scale per chunk: four lanes have all of a row's chunk, so nothing is read twice
#pragma once

#include "cuda/linear/integer.h"

namespace llmkern::cuda {

enum XFrom { X_CODES, X_ROWS, X_CHUNKS };

constexpr int INTEGER_STREAM_WARPS = 8;

template <int TOKEN_TILES>
struct XScales {  // in shared memory, behind the sums
    int largest[INTEGER_STREAM_WARPS][TOKEN_TILES * 8];
    int of_block[TOKEN_TILES * 8];
    float scale[TOKEN_TILES * 8];
};

template <int ROW_TILES, int TOKEN_TILES>
constexpr int integer_stream_sums = ROW_TILES * TOKEN_TILES * 4 * 32 * INTEGER_STREAM_WARPS * 4;  // bytes

// GROUPED: w has several scales per row; a chunk's sums are scaled at once. ALIGNED: rows of w start at multiples of 16
// bytes; with x quantized here, those of x too.
template <class Format, class T, XFrom X, int ROW_TILES, int TOKEN_TILES, int DEPTH, bool GROUPED, bool ALIGNED>
struct IntegerStream {
    static constexpr int LANE = Format::LANE_COLUMNS, CHUNK = 4 * LANE, TOKENS = 8 * TOKEN_TILES;
    static constexpr int RAW = X == X_CODES ? LANE / 16 : LANE / 8;
    static_assert(X == X_CODES || ALIGNED);

    struct Stage {
        Words4 w[ROW_TILES][2];
        uint32_t scale[ROW_TILES][2];  // bits: what becomes of them must not wait for them
        int zero[ROW_TILES][2];
    };
    using Raw = Words4[TOKEN_TILES][RAW];          // x as it is in memory
    using Codes = Words4[TOKEN_TILES][LANE / 16];  // and as products take it
    using Sums = int[ROW_TILES][TOKEN_TILES][4];

    const IntegerArgs& args;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int64_t first_row, first_token;
    const bool offsets;
    XScales<TOKEN_TILES>& x_scales;
    float inverse[TOKEN_TILES];
    Sums sums = {};
    int x_sums[TOKEN_TILES][4] = {};
    float acc[GROUPED ? ROW_TILES : 1][GROUPED ? TOKEN_TILES : 1][4] = {};

    LLMKERN_DEVICE IntegerStream(const IntegerArgs& args, int64_t first_row, int64_t first_token)
        : args(args),
          first_row(first_row),
          first_token(first_token),
          offsets(Format::OFFSET || args.zeros),
          x_scales(*reinterpret_cast<XScales<TOKEN_TILES>*>(shared_memory() +
                                                            integer_stream_sums<ROW_TILES, TOKEN_TILES>)) {}

    // Rows that are not there are others', whose results nobody stores.
    LLMKERN_DEVICE int64_t row_at(int r, int half) const {
        return smaller<int64_t>(first_row + 16 * r + 8 * half + g, args.out.n - 1);
    }
    LLMKERN_DEVICE int64_t token_at(int place) const { return smaller<int64_t>(first_token + place, args.out.m - 1); }

    LLMKERN_DEVICE Words4 load_codes(int64_t row, int byte) const {
        const uint8_t* const at = args.codes + row * int64_t(args.row_bytes) + byte;
        if (ALIGNED) return byte < args.row_bytes ? load_once(at) : Words4{};
        Words4 v{};
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (byte + i < args.row_bytes) v.w[i / 4] |= uint32_t(at[i]) << i % 4 * 8;
        return v;
    }

    LLMKERN_DEVICE int zero_at(int64_t at) const { return args.zeros ? args.zeros[at] : 0; }

    LLMKERN_DEVICE void load(Stage& stage, int chunk) const {
        const int column = chunk * CHUNK + c * LANE;
        const int group = args.group_size.divide(smaller(column, args.k - 1));
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t row = row_at(r, h);
                stage.w[r][h] = load_codes(row, chunk * 64 + c * 16);
                if (GROUPED) {
                    const int64_t at = row * args.groups + group;
                    stage.scale[r][h] = load_bits(args.scales, at, args.scales_dtype);
                    stage.zero[r][h] = zero_at(at);
                }
            }
    }

    LLMKERN_DEVICE void load_x(Raw& to, int chunk) const {
        const int column = chunk * CHUNK + c * LANE;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            const int64_t token = token_at(8 * t + g);
#pragma unroll
            for (int i = 0; i < RAW; i++) {
                if (X == X_CODES) {
                    const int at = column + 16 * i;
                    to[t][i] =
                        at < args.padded_k ? load_shared_use(args.x_codes + token * args.padded_k + at) : Words4{};
                } else {
                    to[t][i] = load_halves<true>(static_cast<const uint16_t*>(args.x) + token * args.k, column + 8 * i,
                                                 args.k);
                }
            }
        }
    }

    // scale: of tokens 2c and 2c + 1, if the chunk has its own.
    LLMKERN_DEVICE void to_codes(const Raw& raw, Codes& codes, float (&scale)[TOKEN_TILES][2]) const {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            if constexpr (X == X_CODES) {
#pragma unroll
                for (int i = 0; i < RAW; i++) codes[t][i] = raw[t][i];
            } else {
                float step = inverse[t];
                if (X == X_CHUNKS) {
                    uint32_t largest = 0;
#pragma unroll
                    for (int i = 0; i < RAW; i++) largest = largest_of(largest, raw[t][i]);
                    const Steps<T> steps(largest_of_lanes(larger_half(largest), 4));
                    step = steps.inverse;
#pragma unroll
                    for (int i = 0; i < 2; i++) scale[t][i] = shuffle(steps.scale, 4 * (2 * c + i));
                }
#pragma unroll
                for (int i = 0; i < LANE / 16; i++) codes[t][i] = quantize<T>(raw[t][2 * i], raw[t][2 * i + 1], step);
            }
        }
    }

    LLMKERN_DEVICE void multiply(const Stage& stage, const Codes& x) {
#pragma unroll
        for (int p = 0; p < Format::PRODUCTS; p++) {
            uint32_t b[TOKEN_TILES][2];
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++) Format::right(x[t], p, b[t][0], b[t][1]);
            if (offsets) {
                const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++) mma_s8(x_sums[t], ones, b[t][0], b[t][1]);
            }
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                uint32_t a[4];
                Format::left(stage.w[r][0], p, a[0], a[2]);
                Format::left(stage.w[r][1], p, a[1], a[3]);
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++) mma_s8(sums[r][t], a, b[t][0], b[t][1]);
            }
        }
    }

    // A group's part of the sums, and from zero again.
    LLMKERN_DEVICE void scale_sums(const Stage& stage, int chunk, float (&scale)[TOKEN_TILES][2]) {
        if (X == X_CODES) {
            const int group = args.group_size.divide(chunk * CHUNK);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    scale[t][i] =
                        args.x_groups > 1 ? args.x_scales[token_at(8 * t + 2 * c + i) * args.x_groups + group] : 1.0f;
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float dot = float(sums[r][t][i] - (Format::OFFSET + stage.zero[r][i / 2]) * x_sums[t][i]);
                    acc[r][t][i] += dot * (X == X_ROWS ? 1.0f : scale[t][i % 2]) *
                                    bits_to_float(stage.scale[r][i / 2], args.scales_dtype);
                    sums[r][t][i] = 0;
                }
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) x_sums[t][i] = 0;
    }

    // The scale of each row of x, from all of its columns.
    LLMKERN_DEVICE void find_scales(int split) {
        const int warp = thread() / 32, threads = INTEGER_STREAM_WARPS * 32;
        const int tokens = int(smaller<int64_t>(args.out.m - first_token, TOKENS));
        uint32_t largest[TOKENS] = {};
        for (int column = (split * threads + thread()) * 8; column < args.k; column += args.splits * threads * 8)
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (t < tokens)
                    largest[t] = largest_of(largest[t], load_shared_use(static_cast<const uint16_t*>(args.x) +
                                                                        (first_token + t) * args.k + column));
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int of_warp = largest_of_lanes(larger_half(largest[t]), 32);
            if (thread() % 32 == 0) x_scales.largest[warp][t] = of_warp;
        }
        sync_block();
        if (thread() < TOKENS) {
            int of_block = 0;
#pragma unroll
            for (int w = 0; w < INTEGER_STREAM_WARPS; w++)
                if (x_scales.largest[w][thread()] > of_block) of_block = x_scales.largest[w][thread()];
            x_scales.of_block[thread()] = of_block;
        }
        args.splits > 1 ? sync_cluster() : sync_block();
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            int bits = 0;
            for (int rank = 0; rank < args.splits; rank++) {
                const int there = load_cluster(x_scales.of_block + 8 * t + g, rank);
                if (there > bits) bits = there;
            }
            const Steps<T> steps(bits);
            inverse[t] = steps.inverse;
            if (warp == 0 && c == 0) x_scales.scale[8 * t + g] = steps.scale;
        }
    }

    LLMKERN_DEVICE void run(int split) {
        const int chunks = (args.k + CHUNK - 1) / CHUNK;
        const int step = INTEGER_STREAM_WARPS * args.splits;
        const int first = split * INTEGER_STREAM_WARPS + thread() / 32;
        Stage stages[DEPTH];
        Raw raw;
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (first + d * step < chunks) load(stages[d], first + d * step);
        load_x(raw, first);
        if constexpr (X == X_ROWS) find_scales(split);
        for (int chunk = first; chunk < chunks; chunk += DEPTH * step)
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int at = chunk + d * step;
                if (at < chunks) {
                    Codes codes;
                    float scale[TOKEN_TILES][2];
                    to_codes(raw, codes, scale);
                    load_x(raw, at + step);
                    multiply(stages[d], codes);
                    if constexpr (GROUPED) scale_sums(stages[d], at, scale);
                }
                if (at + DEPTH * step < chunks) load(stages[d], at + DEPTH * step);
            }
        const auto x_scale = [&](int64_t token) {
            if (X == X_ROWS) return x_scales.scale[token - first_token];
            return X == X_CODES && args.x_groups == 1 ? args.x_scales[token] : 1.0f;
        };
        const auto store = [&](int64_t row, int64_t token, float sum, float scale) {
            static_cast<uint16_t*>(args.out.y)[token * args.out.n + row] =
                finish(args.y_dtype, sum, scale, bias_at(args.out, row));
        };
        if constexpr (GROUPED) {
            reduce_tiles<ROW_TILES, TOKEN_TILES, INTEGER_STREAM_WARPS>(
                acc, args.out, first_row, first_token, split, args.splits,
                [&](int64_t row, int64_t token, float sum) { store(row, token, sum, x_scale(token)); });
        } else {
            if (offsets) {
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            sums[r][t][i] -= (Format::OFFSET + zero_at(row_at(r, i / 2))) * x_sums[t][i];
            }
            reduce_tiles<ROW_TILES, TOKEN_TILES, INTEGER_STREAM_WARPS>(
                sums, args.out, first_row, first_token, split, args.splits, [&](int64_t row, int64_t token, int sum) {
                    const float scale = load_float(args.scales, row, args.scales_dtype);
                    store(row, token, float(sum), scale * x_scale(token));
                });
        }
    }
};

template <class Format, class T, XFrom X, int ROW_TILES, int TOKEN_TILES, int DEPTH, bool GROUPED, bool ALIGNED>
__global__ void __launch_bounds__(INTEGER_STREAM_WARPS * 32) integer_stream_kernel(IntegerArgs args) {
    IntegerStream<Format, T, X, ROW_TILES, TOKEN_TILES, DEPTH, GROUPED, ALIGNED> stream(
        args, int64_t(block_x()) * ROW_TILES * 16, int64_t(block_z()) * TOKEN_TILES * 8);
    stream.run(block_y());
}

// `x_group`: columns of x that share a scale.
template <class Format>
void launch_integer_stream(const char* name, const IntegerCodesArgs& from, int row_bytes, int64_t x_group,
                           const Plan& plan) {
    const IntegerArgs args = integer_args<Format>(name, from, row_bytes, x_group, plan);
    const bool aligned = row_bytes % 16 == 0 && aligned_to(args.codes, 16), grouped = args.groups > 1;
    const auto start = [&](auto kernel, int row_tiles, int token_tiles, int bytes) {
        const Grid grid = tile_grid(args.out.n, args.out.m, 16 * row_tiles, 8 * token_tiles, plan.splits,
                                    INTEGER_STREAM_WARPS * 32, size_t(bytes));
        launch(name, kernel, grid, from.codes.linear.stream, args);
    };
    // Where x has scales of its own per group, so has w, and where int4 codes have one scale per row, x has too.
#define LLMKERN_STREAM(T, X, rows, tokens, depth, is_aligned)                                                       \
    {                                                                                                               \
        constexpr int bytes = integer_stream_sums<rows, tokens> + (X == X_ROWS ? int(sizeof(XScales<tokens>)) : 0); \
        if constexpr (X != X_CHUNKS) {                                                                              \
            if (!grouped)                                                                                           \
                return start(integer_stream_kernel<Format, T, X, rows, tokens, depth, false, is_aligned>, rows,     \
                             tokens, bytes);                                                                        \
        }                                                                                                           \
        if constexpr (X != X_ROWS || !Format::OFFSET)                                                               \
            return start(integer_stream_kernel<Format, T, X, rows, tokens, depth, true, is_aligned>, rows, tokens,  \
                         bytes);                                                                                    \
    }
#define LLMKERN_STREAM_INSIDE(X)                                                                        \
    {                                                                                                   \
        const bool bf16 = args.y_dtype == DType::BF16;                                                  \
        if (plan.row_tiles == 1) {                                                                      \
            if (bf16) LLMKERN_STREAM(Bf16, X, 1, 1, 4, true) else LLMKERN_STREAM(F16, X, 1, 1, 4, true) \
        } else if (plan.row_tiles == 2) {                                                               \
            if (bf16) LLMKERN_STREAM(Bf16, X, 2, 1, 4, true) else LLMKERN_STREAM(F16, X, 2, 1, 4, true) \
        }                                                                                               \
    }
    if (!args.x_codes) {
        if (!aligned || args.k % 8 || !aligned_to(args.x, 16) || plan.token_tiles != 1)
            throw std::runtime_error(std::string(name) +
                                     ": x is quantized inside only for up to 8 rows at a time, where rows of x and w "
                                     "start at multiples of 16 bytes");
        if (args.x_groups == 1) LLMKERN_STREAM_INSIDE(X_ROWS)
        if constexpr (Format::OFFSET) {
            if (args.x_groups > 1 && x_group == 4 * Format::LANE_COLUMNS) LLMKERN_STREAM_INSIDE(X_CHUNKS)
        }
    } else {
        if (!aligned) LLMKERN_STREAM(Bf16, X_CODES, 1, 1, 1, false)
        if (plan.token_tiles == 1 && plan.row_tiles == 1) LLMKERN_STREAM(Bf16, X_CODES, 1, 1, 4, true)
        if (plan.token_tiles == 1 && plan.row_tiles == 2) LLMKERN_STREAM(Bf16, X_CODES, 2, 1, 4, true)
        if (plan.token_tiles == 2 && plan.row_tiles == 4) LLMKERN_STREAM(Bf16, X_CODES, 4, 2, 2, true)
    }
#undef LLMKERN_STREAM_INSIDE
#undef LLMKERN_STREAM
    no_instance(name, plan);
}

}  // namespace llmkern::cuda
