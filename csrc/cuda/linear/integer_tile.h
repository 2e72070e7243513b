// More rows of quantized x: tiles of w and of x's codes wait in shared memory, STAGES steps of 128 columns, and meet in
// products of bytes.
//
//   a block     128 rows of w, TOKEN_WARPS * TOKEN_TILES * 8 rows of x; the blocks of its cluster divide K
//   a warp      of 2 * TOKEN_WARPS: 64 rows of w, TOKEN_TILES * 8 rows of x
//
// A lane takes 16 bytes at a time, see Int8Codes. Eight lanes read together: four of a row and four of the next; which
// 16 bytes of a row of 128 lie where, depends on the row's lowest bit such that the eight lie in different banks.
#pragma once

#include "cuda/linear/bands.h"
#include "cuda/linear/cluster_sum.h"
#include "cuda/linear/integer.h"

namespace llmkern::cuda {

constexpr int TILE_ROWS = 128, TILE_STEP = 128, TILE_STAGES = 3;
constexpr int TILE_STRIDE = TILE_ROWS + 4;  // of sums in shared memory: the lanes of a store in different banks

template <class Format>
constexpr int w_step_bytes = TILE_STEP * 16 / Format::LANE_COLUMNS;  // of a row: 128 or 64

template <class Format>
constexpr int integer_tile_bytes(int tokens) {
    const int stages = TILE_STAGES * (TILE_ROWS * w_step_bytes<Format> + tokens * TILE_STEP);
    const int sums = tokens * TILE_STRIDE * 4;
    return stages > sums ? stages : sums;
}

// From the sums of a block's tile in shared memory, [TOKENS][ROWS + 4], to y: together with those of the cluster's
// other blocks, of which each stores its share. By the block's first THREADS threads, after all have put their sums.
template <class Format, class V, int THREADS, int TOKENS, int ROWS = TILE_ROWS>
LLMKERN_DEVICE void store_sums(const IntegerArgs& args, int64_t first_row, int64_t first_token, int split) {
    const V* const sums = reinterpret_cast<const V*>(shared_memory());
    constexpr int OCTETS = ROWS / 8, AT_ONCE = THREADS / OCTETS;
    const int octet = thread() % OCTETS;
    const int64_t row = first_row + 8 * octet;
    const bool whole = args.out.n % 8 == 0 && reinterpret_cast<uintptr_t>(args.out.y) % 16 == 0;
    const bool scaled = std::is_same_v<V, float>;  // by w's scales
    const bool offsets = !scaled && (Format::OFFSET || args.zeros);
    float scale[8], bias[8];
    int offset[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int64_t at = smaller<int64_t>(row + i, args.out.n - 1);
        bias[i] = bias_at(args.out, at);
        scale[i] = scaled ? 1.0f : load_float(args.scales, at, args.scales_dtype);
        offset[i] = Format::OFFSET + (offsets && args.zeros ? args.zeros[at] : 0);
    }
    const int tokens = row < args.out.n ? int(smaller<int64_t>(args.out.m - first_token, TOKENS)) : 0;
    for (int t = thread() / OCTETS + split * AT_ONCE; t < tokens; t += args.splits * AT_ONCE) {
        const int64_t token = first_token + t;
        const float x_scale = args.x_groups == 1 ? args.x_scales[token] : 1.0f;
        const int x_sum = offsets ? args.x_sums[token] : 0;
        union {
            Words4 words;
            uint16_t halves[8];
        } y;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            V sum[4];
            cluster_sum(sums + t * (ROWS + 4) + 8 * octet + 4 * half, args.splits, sum);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int i = 4 * half + j;
                if (offsets) sum[j] -= V(offset[i] * x_sum);
                y.halves[i] = finish(args.y_dtype, float(sum[j]), scale[i] * x_scale, bias[i]);
            }
        }
        uint16_t* const to = static_cast<uint16_t*>(args.out.y) + token * args.out.n + row;
        if (whole) {
            *reinterpret_cast<Words4*>(to) = y.words;
        } else {
            for (int i = 0; i < 8; i++)
                if (row + i < args.out.n) to[i] = y.halves[i];
        }
    }
}

// The same when all THREADS of the block have put what they have.
template <class Format, class V, int THREADS, int TOKENS>
LLMKERN_DEVICE void store_tile(const IntegerArgs& args, int64_t first_row, int64_t first_token, int split) {
    args.splits > 1 ? sync_cluster() : sync_block();
    store_sums<Format, V, THREADS, TOKENS>(args, first_row, first_token, split);
    if (args.splits > 1) sync_cluster();  // nobody leaves while another reads its memory
}

// The steps of K of one of the cluster's blocks.
LLMKERN_DEVICE void steps_of(const IntegerArgs& args, int split, int& first, int& last) {
    const int steps = (args.k + TILE_STEP - 1) / TILE_STEP;
    first = int(int64_t(steps) * split / args.splits), last = int(int64_t(steps) * (split + 1) / args.splits);
}

// Asks for a step of a Tile's w and x, into what is shared at `w` and at `x`: 16 bytes of a row at a time, each where
// the Tile wants it.
template <class Tile, int THREADS, bool ALIGNED>
LLMKERN_DEVICE void load_step(const IntegerArgs& args, int64_t first_row, int64_t first_token, int step, uint8_t* w,
                              uint8_t* x) {
    constexpr int W_PIECES = Tile::W_BYTES / 16, W_TURNS = TILE_ROWS * W_PIECES / THREADS;
    constexpr int X_PIECES = TILE_STEP / 16, X_ALL = Tile::TOKENS * X_PIECES, X_TURNS = (X_ALL + THREADS - 1) / THREADS;
#pragma unroll(ALIGNED ? W_TURNS : 1)
    for (int i = 0; i < W_TURNS; i++) {
        const int at = i * THREADS + thread(), row = at / W_PIECES, piece = at % W_PIECES;
        const int byte = step * Tile::W_BYTES + piece * 16;
        const uint8_t* const from = args.codes + smaller<int64_t>(first_row + row, args.out.n - 1) * args.row_bytes;
        uint8_t* const to = w + Tile::w_place(row, piece);
        if (ALIGNED) {
            copy_async(to, byte < args.row_bytes ? from + byte : from, byte < args.row_bytes ? 16 : 0);
        } else {
            Words4 v{};
#pragma unroll
            for (int j = 0; j < 16; j++)
                if (byte + j < args.row_bytes) v.w[j / 4] |= uint32_t(from[byte + j]) << j % 4 * 8;
            *reinterpret_cast<Words4*>(to) = v;
        }
    }
#pragma unroll
    for (int i = 0; i < X_TURNS; i++) {
        const int at = i * THREADS + thread(), token = at / X_PIECES, piece = at % X_PIECES;
        if (X_ALL % THREADS && at >= X_ALL) break;
        const int column = step * TILE_STEP + piece * 16;
        const int8_t* const from = args.x_codes + smaller<int64_t>(first_token + token, args.out.m - 1) * args.padded_k;
        const bool inside = column < args.padded_k;
        copy_async(x + Tile::x_place(token, piece), inside ? from + column : from, inside ? 16 : 0);
    }
}

// GROUPED: w has several scales per row. ALIGNED: rows of w start at multiples of 16 bytes.
template <class Format, int TOKEN_WARPS, int TOKEN_TILES, bool GROUPED, bool ALIGNED>
struct IntegerTile {
    static constexpr int ROW_TILES = 4, TOKENS = TOKEN_WARPS * TOKEN_TILES * 8, THREADS = TOKEN_WARPS * 64;
    static constexpr int W_BYTES = w_step_bytes<Format>;
    static constexpr int CHUNK = 4 * Format::LANE_COLUMNS, CHUNKS = TILE_STEP / CHUNK;
    static constexpr int W_STAGE = TILE_ROWS * W_BYTES, STAGE = W_STAGE + TOKENS * TILE_STEP;

    const IntegerArgs& args;
    const int64_t first_row, first_token;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int warp_row = thread() / 32 % 2 * 64, warp_token = thread() / 64 * 8 * TOKEN_TILES;
    int sums[ROW_TILES][TOKEN_TILES][4] = {};
    float acc[GROUPED ? ROW_TILES : 1][GROUPED ? TOKEN_TILES : 1][4] = {};
    uint32_t scale[ROW_TILES][2];  // of the group under way; bits, so that loading them does not wait for them
    int zero[ROW_TILES][2];

    LLMKERN_DEVICE IntegerTile(const IntegerArgs& args, int64_t first_row, int64_t first_token)
        : args(args), first_row(first_row), first_token(first_token) {}

    // Where piece `piece` of 16 bytes of a row lies.
    static LLMKERN_DEVICE int w_place(int row, int piece) {
        return row * W_BYTES + (W_BYTES == 128 ? piece ^ row % 2 * 4 : piece) * 16;
    }
    static LLMKERN_DEVICE int x_place(int token, int piece) {
        return token * TILE_STEP + (piece ^ token % 2 * Format::X_SWIZZLE) * 16;
    }

    LLMKERN_DEVICE void load(int step, int stage) const {
        uint8_t* const w = shared_memory() + stage * STAGE;
        load_step<IntegerTile, THREADS, ALIGNED>(args, first_row, first_token, step, w, w + W_STAGE);
    }

    LLMKERN_DEVICE void load_scales(int group) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t row = smaller<int64_t>(first_row + warp_row + 16 * r + 8 * h + g, args.out.n - 1);
                scale[r][h] = load_bits(args.scales, row * args.groups + group, args.scales_dtype);
                zero[r][h] = args.zeros ? args.zeros[row * args.groups + group] : 0;
            }
    }

    LLMKERN_DEVICE void multiply(int stage, int chunk) {
        const uint8_t* const w = shared_memory() + stage * STAGE;
        const uint8_t* const x = w + W_STAGE;
        constexpr int X_PIECES = Format::LANE_COLUMNS / 16;
        Words4 a[ROW_TILES][2], b[TOKEN_TILES][X_PIECES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                a[r][h] = *reinterpret_cast<const Words4*>(w + w_place(warp_row + 16 * r + 8 * h + g, 4 * chunk + c));
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int i = 0; i < X_PIECES; i++)
                b[t][i] =
                    *reinterpret_cast<const Words4*>(x + x_place(warp_token + 8 * t + g, 4 * chunk + c * X_PIECES + i));
#pragma unroll
        for (int p = 0; p < Format::PRODUCTS; p++) {
            uint32_t left[ROW_TILES][4];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                Format::left(a[r][0], p, left[r][0], left[r][2]);
                Format::left(a[r][1], p, left[r][1], left[r][3]);
            }
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++) {
                uint32_t right[2];
                Format::right(b[t], p, right[0], right[1]);
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) mma_s8(sums[r][t], left[r], right[0], right[1]);
            }
        }
    }

    // `x_sums` has a group's whole sums, so this is for whole groups, or a cluster's first block of a group takes them.
    LLMKERN_DEVICE void scale_sums(int group, bool first_of_group) {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int64_t token = smaller<int64_t>(first_token + warp_token + 8 * t + 2 * c + i, args.out.m - 1);
                const int x_sum =
                    (Format::OFFSET || args.zeros) && first_of_group ? args.x_sums[token * args.groups + group] : 0;
                const float x_scale = args.x_groups > 1 ? args.x_scales[token * args.x_groups + group] : 1.0f;
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        int& sum = sums[r][t][2 * h + i];
                        acc[r][t][2 * h + i] += float(sum - (Format::OFFSET + zero[r][h]) * x_sum) * x_scale *
                                                bits_to_float(scale[r][h], args.scales_dtype);
                        sum = 0;
                    }
            }
    }

    template <class V, int A, int B>
    LLMKERN_DEVICE void to_shared(const V (&values)[A][B][4]) const {
        V* const to = reinterpret_cast<V*>(shared_memory());
#pragma unroll
        for (int r = 0; r < A; r++)
#pragma unroll
            for (int t = 0; t < B; t++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    to[(warp_token + 8 * t + 2 * c + i % 2) * TILE_STRIDE + warp_row + 16 * r + i / 2 * 8 + g] =
                        values[r][t][i];
    }

    LLMKERN_DEVICE void run(int split) {
        int first, last;
        steps_of(args, split, first, last);
#pragma unroll
        for (int s = 0; s < TILE_STAGES - 1; s++) {
            if (first + s < last) load(first + s, s);
            copy_async_commit();
        }
        int group = -1;
        bool first_of_group = false;
        for (int step = first, stage = 0; step < last; step++, stage = stage + 1 == TILE_STAGES ? 0 : stage + 1) {
            copy_async_wait<TILE_STAGES - 2>();
            sync_block();
            if (step + TILE_STAGES - 1 < last) load(step + TILE_STAGES - 1, stage == 0 ? TILE_STAGES - 1 : stage - 1);
            copy_async_commit();
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const int column = step * TILE_STEP + chunk * CHUNK;
                if (GROUPED && column < args.k && group != args.group_size.divide(column)) {
                    if (group >= 0) scale_sums(group, first_of_group);
                    group = args.group_size.divide(column);
                    first_of_group = column == group * int(args.group_size.divisor);
                    load_scales(group);
                }
                multiply(stage, chunk);
            }
        }
        copy_async_wait<0>();
        sync_block();
        if constexpr (GROUPED) {
            if (group >= 0) scale_sums(group, first_of_group);
            to_shared(acc);
            store_tile<Format, float, THREADS, TOKENS>(args, first_row, first_token, split);
        } else {
            to_shared(sums);
            store_tile<Format, int, THREADS, TOKENS>(args, first_row, first_token, split);
        }
    }
};

template <class Format, int TOKEN_WARPS, int TOKEN_TILES, bool GROUPED, bool ALIGNED>
__global__ void __launch_bounds__(64 * TOKEN_WARPS) integer_tile_kernel(IntegerArgs args) {
    using Tile = IntegerTile<Format, TOKEN_WARPS, TOKEN_TILES, GROUPED, ALIGNED>;
    int64_t first_row, first_token;
    tile_of<TILE_ROWS, Tile::TOKENS>(args.out, block_x(), first_row, first_token);
    Tile tile(args, first_row, first_token);
    tile.run(block_y());
}

// `x_group`: columns of x that share a scale.
template <class Format>
void launch_integer_tile(const char* name, const IntegerCodesArgs& from, int row_bytes, int64_t x_group,
                         const Plan& plan) {
    const IntegerArgs args = integer_args<Format>(name, from, row_bytes, x_group, plan);
    const bool aligned = row_bytes % 16 == 0 && aligned_to(args.codes, 16), grouped = args.groups > 1;
    const auto start = [&](auto kernel, int token_warps, int token_tiles) {
        Grid grid;
        const int tokens = 8 * token_warps * token_tiles;
        grid.x = unsigned((args.out.n + TILE_ROWS - 1) / TILE_ROWS * ((args.out.m + tokens - 1) / tokens));
        grid.y = grid.cluster_y = unsigned(plan.splits);
        grid.threads = unsigned(64 * token_warps);
        grid.shared_bytes = size_t(integer_tile_bytes<Format>(tokens));
        launch(name, kernel, grid, from.codes.linear.stream, args);
    };
#define LLMKERN_TILE(warps, tokens, is_grouped, is_aligned) \
    return start(integer_tile_kernel<Format, warps, tokens, is_grouped, is_aligned>, warps, tokens)
    if (!args.x_codes) throw std::runtime_error(std::string(name) + ": needs room for quantized x");
    if (!aligned && grouped) LLMKERN_TILE(4, 2, true, false);
    if (!aligned) LLMKERN_TILE(4, 2, false, false);
    if (plan.token_tiles == 4 && grouped) LLMKERN_TILE(2, 2, true, true);
    if (plan.token_tiles == 4) LLMKERN_TILE(2, 2, false, true);
    if (plan.token_tiles == 8 && grouped) LLMKERN_TILE(4, 2, true, true);
    if (plan.token_tiles == 8) LLMKERN_TILE(2, 4, false, true);
    if (plan.token_tiles == 16 && !grouped) LLMKERN_TILE(4, 4, false, true);
#undef LLMKERN_TILE
    no_instance(name, plan);
}

}  // namespace llmkern::cuda
