// Many rows of x: what a block multiplies comes to shared memory in the background, several stages ahead. A stage is
// PARTS times 64 columns of K; a part is
//
//   x       [TOKENS][128 bytes], swizzled (common/matrix_descriptor.h)
//   codes   [ROWS][32 bytes] of int4, [ROWS][64 bytes] of int8, of which 16 bytes u stand at u ^ (row / 2 % 4): whether
//           lanes read words or 16 bytes of eight rows, they touch all banks
//   scales  [ROWS][SLOTS], of 64 / SLOTS columns each: a pair of T, and what `neighbours` adds for the zero
//
// Scales take another way than the rest, through registers, since they become pairs of T on it. Weights are scaled in
// T: for a stage, ROWS * 64 / 2 products of pairs for each block, which for 64 rows of x and more is less than scaling
// sums, and sums of one group would not fit beside those of all. Scales per row wait for the end. fp16 would lose a
// small scale's bits: there, the power of two of a row's first scale waits for the end too.
#pragma once

#include "cuda/common/divisor.h"
#include "cuda/common/instructions.h"
#include "cuda/common/matrix_descriptor.h"
#include "cuda/common/values.h"
#include "cuda/linear/codes.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

struct TileArgs {
    const void* x;
    const uint8_t* codes;
    int row_bytes;
    const void* scales;
    DType scales_dtype;
    const int8_t* zeros;
    int groups;
    Divisor group_units;  // of LANE_COLUMNS
    int k;
    int splits;                     // blocks of a cluster, each with a share of the stages
    int tokens;                     // rows of x of a block, at most TOKENS
    bool x_aligned, codes_aligned;  // rows start at multiples of 16 bytes
    Output out;
};

constexpr int TILE_COLUMNS = 64;

// What a row's scales are divided by, from its first one. fp16 then has 2^10 to spare on either side; at least 2^-12,
// so that a first group of next to nothing does not lift the others beyond its range: scales up to 1 fit in any case.
template <class T>
LLMKERN_DEVICE float power_of_two(float scale) {
    if (!std::is_same_v<T, F16>) return 1;
    constexpr uint32_t LEAST = (127 - 12) << 23, MOST = (127 + 100) << 23;
    const uint32_t exponent = float_bits(scale) & 0x7f800000;
    return exponent > MOST ? 1 : as_float(exponent < LEAST ? LEAST : exponent) * 16;
}

// What a row's sums are multiplied with in the end.
template <class T>
LLMKERN_DEVICE float row_factor(const TileArgs& args, int64_t row) {
    if (args.groups < 1) return 1;
    const float first = load_float(args.scales, row * args.groups, args.scales_dtype);
    return args.groups == 1 ? first : power_of_two<T>(first);
}

// 16 bytes of rows that start anywhere, in pieces that do not: `bytes` of them, zeros for the rest.
template <class Piece>
LLMKERN_DEVICE void copy_now(void* to, const void* from, int bytes) {
    constexpr int SIZE = sizeof(Piece);
    Words4 v{};
#pragma unroll
    for (int i = 0; i < 16; i += SIZE)
        if (i < bytes) v.w[i / 4] |= uint32_t(static_cast<const Piece*>(from)[i / SIZE]) << i % 4 * 8;
    *static_cast<Words4*>(to) = v;
}

struct alignas(8) TileScale {
    uint32_t scale, offset;
};

// All that reads a stage must be done when the next `arrive` begins.
template <class Format, class T, int ROWS, int TOKENS, int PARTS, int STAGES, int THREADS>
struct TileFeed {
    static constexpr int AHEAD = STAGES - 1;           // stages under way while one is used
    static constexpr int LANE = Format::LANE_COLUMNS;  // of 16 bytes of codes; groups are multiples of it
    static constexpr int CODE_UNITS = TILE_COLUMNS / LANE, SLOTS = CODE_UNITS, PITCH = CODE_UNITS * 16;
    static constexpr int X_BYTES = TOKENS * TILE_ROW_BYTES, PART_BYTES = X_BYTES + ROWS * PITCH;
    static constexpr int STAGE_BYTES = PARTS * PART_BYTES;
    static constexpr int STAGE_SCALES = PARTS * ROWS * SLOTS;
    static constexpr int PLACES = 2;  // for scales: of the stage in use and of the next
    static constexpr int BYTES = STAGES * STAGE_BYTES + PLACES * STAGE_SCALES * int(sizeof(TileScale));
    static constexpr int HELD = (STAGE_SCALES + THREADS - 1) / THREADS;
    static_assert(PART_BYTES % 1024 == 0, "a tile of x must start at a multiple of 1024 bytes");

    const TileArgs& args;
    const int64_t first_row, first_token;
    const int tokens;       // that exist
    const int first, last;  // stages
    const bool wide;        // one scale for 64 columns
    uint32_t scale[HELD];   // bits: what becomes of them must not wait for them
    float factor[HELD];
    int zero[HELD];

    LLMKERN_DEVICE TileFeed(const TileArgs& args, int64_t first_row, int64_t first_token, int split)
        : args(args),
          first_row(first_row),
          first_token(first_token),
          tokens(int(smaller<int64_t>(args.tokens, args.out.m - first_token))),
          first(int(int64_t(stages(args)) * split / args.splits)),
          last(int(int64_t(stages(args)) * (split + 1) / args.splits)),
          wide(args.groups <= 1 || args.group_units.divisor % SLOTS == 0) {}

    static LLMKERN_DEVICE int stages(const TileArgs& args) {
        return (args.k + PARTS * TILE_COLUMNS - 1) / (PARTS * TILE_COLUMNS);
    }

    LLMKERN_DEVICE uint8_t* x(int stage, int part) const {
        return shared_memory() + (stage - first) % STAGES * STAGE_BYTES + part * PART_BYTES;
    }
    LLMKERN_DEVICE uint8_t* codes(int stage, int part) const { return x(stage, part) + X_BYTES; }
    // Where 16 bytes of a row's codes stand among those of a part.
    static LLMKERN_DEVICE int code_unit(int row, int unit) {
        return row * PITCH + (CODE_UNITS == 4 ? unit ^ (row / 2 & 3) : unit) * 16;
    }
    LLMKERN_DEVICE TileScale* scales(int stage, int part) const {
        return reinterpret_cast<TileScale*>(shared_memory() + STAGES * STAGE_BYTES) +
               (stage - first) % PLACES * STAGE_SCALES + part * (ROWS * SLOTS);
    }
    // The scale of a row's columns from `column` on, in a part.
    LLMKERN_DEVICE TileScale scale_of(int stage, int part, int row, int column) const {
        return scales(stage, part)[row * SLOTS + (wide ? 0 : column / LANE)];
    }

    LLMKERN_DEVICE void fill(int stage) const {
        if (stage >= last) return;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int column = (stage * PARTS + part) * TILE_COLUMNS;
            args.x_aligned ? fill_x<true>(x(stage, part), column) : fill_x<false>(x(stage, part), column);
            args.codes_aligned ? fill_codes<true>(codes(stage, part), column)
                               : fill_codes<false>(codes(stage, part), column);
        }
    }

    // A thread copies the same unit of every THREADS / 8th row of x, so that all its rows have the same swizzle. Where
    // rows are aligned, a unit is whole or is not there.
    template <bool ALIGNED>
    LLMKERN_DEVICE void fill_x(uint8_t* tile, int column) const {
        constexpr int STEP = THREADS / 8;
        static_assert(STEP % 8 == 0, "");
        const int row = thread() / 8, unit = thread() % 8, at = column + unit * 8;
        const int bytes = at < args.k ? 2 * smaller(args.k - at, 8) : 0;
        const uint16_t* from = static_cast<const uint16_t*>(args.x) + (first_token + row) * args.k + at;
        uint8_t* const to = tile + swizzled(row, unit);
#pragma unroll(ALIGNED ? 16 : 1)
        for (int i = 0; i < (TOKENS + STEP - 1) / STEP; i++) {
            if (TOKENS % STEP && row + i * STEP >= TOKENS) break;
            const bool here = row + i * STEP < tokens;
            if (ALIGNED)
                copy_async_if(here && bytes, to + i * STEP * TILE_ROW_BYTES, from);
            else
                copy_now<uint16_t>(to + i * STEP * TILE_ROW_BYTES, from, here ? bytes : 0);
            from += int64_t(STEP) * args.k;
        }
    }

    template <bool ALIGNED>
    LLMKERN_DEVICE void fill_codes(uint8_t* tile, int column) const {
        constexpr int STEP = THREADS / CODE_UNITS;
        static_assert(STEP % 8 == 0, "");
        const int row = thread() / CODE_UNITS, at = (column / LANE + thread() % CODE_UNITS) * 16;
        const int bytes = at < args.row_bytes ? smaller(args.row_bytes - at, 16) : 0;
        const int rows = int(smaller<int64_t>(args.out.n - first_row, ROWS));
        const uint8_t* from = args.codes + (first_row + row) * args.row_bytes + at;
        uint8_t* const to = tile + code_unit(row, thread() % CODE_UNITS);
#pragma unroll(ALIGNED ? 16 : 1)
        for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
            if (ROWS % STEP && row + i * STEP >= ROWS) break;
            const bool here = row + i * STEP < rows;
            if (ALIGNED)
                copy_async_if(here && bytes, to + i * STEP * PITCH, from);
            else
                copy_now<typename Format::Piece>(to + i * STEP * PITCH, from, here ? bytes : 0);
            from += int64_t(STEP) * args.row_bytes;
        }
    }

    // Entry i of this thread among the scales of a stage: row, slot and part.
    template <bool WIDE>
    struct Entry {
        static constexpr int USED = WIDE ? 1 : SLOTS, ALL = PARTS * ROWS * USED, HELD = (ALL + THREADS - 1) / THREADS;
        const int at, row = at / USED % ROWS, slot = at % USED, part = at / USED / ROWS;
        explicit LLMKERN_DEVICE Entry(int i) : at(thread() + i * THREADS) {}
        LLMKERN_DEVICE bool exists() const { return at < ALL; }
    };

    // One scale per row: all places hold the same throughout.
    LLMKERN_DEVICE bool scales_stand(int stage) const {
        return stage >= last || (args.groups <= 1 && stage >= first + PLACES);
    }
    LLMKERN_DEVICE int64_t first_scale(int row) const {
        return smaller<int64_t>(first_row + row, args.out.n - 1) * args.groups;
    }

    template <bool WIDE>
    LLMKERN_DEVICE void load_scales(int stage) {
#pragma unroll
        for (int i = 0; i < Entry<WIDE>::HELD; i++) {
            const Entry<WIDE> entry(i);
            if (!entry.exists()) continue;
            const int unit = (stage * PARTS + entry.part) * SLOTS + entry.slot;
            const int group = args.groups > 1 ? smaller(args.group_units.divide(unit), args.groups - 1) : 0;
            const int64_t at = first_scale(entry.row) + group;
            scale[i] = load_bits(args.scales, at, args.scales_dtype);
            zero[i] = args.zeros ? args.zeros[at] : 0;
        }
    }
    LLMKERN_DEVICE void load_scales(int stage) {
        if (!scales_stand(stage)) wide ? load_scales<true>(stage) : load_scales<false>(stage);
    }

    template <bool WIDE>
    LLMKERN_DEVICE void load_factors() {
#pragma unroll
        for (int i = 0; i < Entry<WIDE>::HELD; i++) {
            const Entry<WIDE> entry(i);
            factor[i] = 1;
            if (std::is_same_v<T, F16> && args.groups > 1 && entry.exists())
                factor[i] = 1 / power_of_two<T>(load_float(args.scales, first_scale(entry.row), args.scales_dtype));
        }
    }

    template <bool WIDE>
    LLMKERN_DEVICE void store_scales(int stage) const {
#pragma unroll
        for (int i = 0; i < Entry<WIDE>::HELD; i++) {
            const Entry<WIDE> entry(i);
            if (!entry.exists()) continue;
            const float value = bits_to_float(scale[i], args.scales_dtype);
            const float scaled = std::is_same_v<T, F16> ? value * factor[i] : value;
            scales(stage, entry.part)[entry.row * SLOTS + entry.slot] = {
                args.groups > 1 ? pack2<T>(scaled, scaled) : Magic<T>::ONE,
                Format::template neighbour_offset<T>(zero[i])};
        }
    }
    LLMKERN_DEVICE void store_scales(int stage) const {
        if (!scales_stand(stage)) wide ? store_scales<true>(stage) : store_scales<false>(stage);
    }

    LLMKERN_DEVICE void start() {
#pragma unroll 1
        for (int i = 0; i < AHEAD; i++) {
            fill(first + i);
            copy_async_commit();
        }
        wide ? load_factors<true>() : load_factors<false>();
        load_scales(first);
    }

    // Returns when `stage` is there for all threads.
    LLMKERN_DEVICE void arrive(int stage) const {
        store_scales(stage);
        copy_async_wait<AHEAD - 1>();
        sync_block();
    }

    // After `arrive`: asks for what comes next.
    LLMKERN_DEVICE void ask(int stage) {
        fill(stage + AHEAD);
        copy_async_commit();
        load_scales(stage + 1);
    }
};

// Sums to y, through shared memory so that neighbours in a row of y are stored together: up to 64 rows of x at a time,
// those of PARTS and of the cluster's blocks added in a fixed order. acc[r]: as mma's d, from row row_of(r) of the
// block.
template <class T, int ROWS, int PARTS, int THREADS>
struct TileStore {
    static constexpr int PIECE = 8;         // tiles of 8 tokens
    static constexpr int PITCH = ROWS + 4;  // in floats: lanes of one store touch all banks
    static constexpr int ALL = PIECE * 8 * PITCH;
    static constexpr int BYTES = PARTS * ALL * int(sizeof(float));
    static_assert(THREADS % (ROWS / 2) == 0, "a thread keeps its rows");

    template <int ROW_TILES, int TOKEN_TILES, class RowOf>
    static LLMKERN_DEVICE void run(const float (&acc)[ROW_TILES][TOKEN_TILES][4], const TileArgs& args,
                                   int64_t first_row, int64_t first_token, int tokens, int split, int part,
                                   RowOf row_of) {
        float* const sums = reinterpret_cast<float*>(shared_memory());
        const int g = thread() % 32 / 4, c = thread() % 4, pair = thread() % (ROWS / 2);
        const int64_t row = first_row + 2 * pair, n = args.out.n;
        float factor[2] = {}, bias[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (row + i < n) {
                factor[i] = row_factor<T>(args, row + i);
                if (args.out.bias) bias[i] = load_float(args.out.bias, row + i, args.out.bias_dtype);
            }
#pragma unroll
        for (int first = 0; first < TOKEN_TILES; first += PIECE) {
            if (first * 8 >= tokens) break;
            sync_block();  // what stood there has been read
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int t = first; t < TOKEN_TILES && t < first + PIECE; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sums[part * ALL + ((t - first) * 8 + 2 * c + i % 2) * PITCH + row_of(r) + g + i / 2 * 8] =
                            acc[r][t][i];
            if (PARTS > 1) {
                sync_block();
                for (int at = thread(); at < ALL; at += THREADS)
#pragma unroll
                    for (int p = 1; p < PARTS; p++) sums[at] += sums[p * ALL + at];
            }
            args.splits > 1 ? sync_cluster() : sync_block();
            const int here = smaller(tokens - first * 8, PIECE * 8);
            for (int at = thread() + split * THREADS; at / (ROWS / 2) < here; at += args.splits * THREADS) {
                const int token = at / (ROWS / 2);
                const float* const from = sums + token * PITCH + 2 * pair;
                float sum[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    sum[i] = 0;
                    if (args.splits > 1)
                        for (int rank = 0; rank < args.splits; rank++) sum[i] += load_cluster(from + i, rank);
                    else
                        sum[i] = from[i];
                    sum[i] = sum[i] * factor[i] + bias[i];
                }
                const uint32_t both = pack2<T>(sum[0], sum[1]);
                uint16_t* const to = static_cast<uint16_t*>(args.out.y) + (first_token + first * 8 + token) * n + row;
                if (n % 2 == 0) {
                    if (row < n) *reinterpret_cast<uint32_t*>(to) = both;
                } else {
                    if (row < n) to[0] = uint16_t(both);
                    if (row + 1 < n) to[1] = uint16_t(both >> 16);
                }
            }
            if (args.splits > 1) sync_cluster();  // nobody goes on while another reads its memory
        }
    }
};

}  // namespace llmkern::cuda
