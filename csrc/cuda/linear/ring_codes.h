// int4 and int8 weights for ring.h. Lane (g, c) uses 16 bytes of rows g, g + 8, g + 16 and g + 24.
//
//   slot    codes [32 rows][64 bytes], swizzled by the copy engine (tensor_map.h), and with groups smaller than a chunk the scales and zeros that each
//           lane has, [2 tiles][2][32][4 bytes] each. A copy has at least 4 bytes, so what is less comes with its
//           neighbours and is picked by its number
//   small   otherwise: of each of a tile's 32 rows the scales of this warp's columns, then the zeros. They come with the
//           tile's first unit, a row's at once: one by one each would take a sector of 32 bytes
//
// Where codes become numbers that are too large by the same for all (BIAS, and a row's zero), the products are made
// with those, and the total of x times what is too much comes off their sum: a product of x with ones has it.
#pragma once

#include "cuda/linear/codes.h"
#include "cuda/linear/ring.h"

namespace llmkern::cuda {

template <class Format, class T, int TOKEN_TILES, RingScales SCALES, bool ZEROS>
struct RingCodes {
    static constexpr int LANE = Format::LANE_COLUMNS, CHUNK = 4 * LANE, PIECES = LANE / 8, PAIRS = Format::PAIRS;
    static constexpr int PIECE_WORDS = 4 / PAIRS;  // of w, for 8 columns
    static constexpr bool OF_LANES = SCALES == RingScales::WEIGHTS, SCALED = SCALES != RingScales::ROWS;
    static constexpr float BIAS = Format::template RAW_BIAS<T>;
    // With scales of lanes weights are made whole: a total of x over lanes would have no scale.
    static constexpr bool TOTALS = !OF_LANES && (ZEROS || BIAS != 0);
    static constexpr int SCALE_AT = 1024 * RING_TILES, ZERO_AT = SCALE_AT + (OF_LANES ? 256 * RING_TILES : 0);
    static constexpr int SLOT_BYTES = OF_LANES ? 3072 : 2048;

    struct Rows {  // of this lane in a tile
        const uint8_t* scale[RING_TILES][2];  // of the first group of this warp
        const uint8_t* zero[RING_TILES][2];
        int entry[RING_TILES][2];
    };

    const RingArgs& args;
    const TensorMap& codes;
    const int first_chunk, chunks;  // of this warp
    const int lane = thread() % 32, g = lane / 4, c = lane % 4;

    // Groups in so many chunks of a row, at most; 0 if nothing of them comes apart from codes.
    static int64_t small_groups(const RingArgs& args, int64_t chunks) {
        if (OF_LANES || (!SCALED && !ZEROS)) return 0;
        const int64_t group_size = args.group_size.divisor;
        return SCALED ? ((chunks - 1) * CHUNK + group_size - 1) / group_size + 1 : 1;
    }
    // Whether every warp's scales of a row start at a multiple of 16 bytes.
    static bool units_fit(const RingArgs& args, int size) {
        if (!SCALED || args.groups * size % 16 || reinterpret_cast<uintptr_t>(args.scales) % 16) return false;
        for (int split = 0; split < 1 << args.split_shift; split++) {
            const int first = args.chunks * split >> args.split_shift;
            const int mine = (args.chunks * (split + 1) >> args.split_shift) - first;
            for (int warp = 0; warp < 1 << args.group_shift; warp++)
                if ((first + (mine * warp >> args.group_shift)) * CHUNK / int(args.group_size.divisor) * size % 16)
                    return false;
        }
        return true;
    }

    // The last row stands for those beyond it, and nobody stores them.
    LLMKERN_DEVICE int row(int tile, int in_tile) const {
        return smaller(tile * 16 * RING_TILES + in_tile, int(args.out.n) - 1);
    }

    // chunk: of all.
    LLMKERN_DEVICE int group_of(int chunk) const {
        if (!SCALED) return 0;
        return args.group_size.divide(OF_LANES ? smaller(chunk * CHUNK + c * LANE, args.k - 1) : chunk * CHUNK);
    }

    LLMKERN_DEVICE void prefetch(int tile) const {
        if (lane == 0)
            for (int d = 0; d < RING_DEPTH<TOKEN_TILES> && d < chunks; d++)
                prefetch_tile(codes, (first_chunk + d) * 64, tile * 16 * RING_TILES);
    }

    LLMKERN_DEVICE bool wide() const { return args.scales_dtype == DType::F32; }
    LLMKERN_DEVICE int scale_size() const { return wide() ? 4 : 2; }
    LLMKERN_DEVICE const uint8_t* scale_word(int entry) const {
        return static_cast<const uint8_t*>(args.scales) + (wide() ? int64_t(entry) * 4 : int64_t(entry >> 1) * 4);
    }
    LLMKERN_DEVICE const uint8_t* zero_word(int entry) const {
        return reinterpret_cast<const uint8_t*>(args.zeros) + (entry & ~3);
    }

    // Of this lane's row of a tile, all that this warp needs.
    LLMKERN_DEVICE void ask_small(uint8_t* to, int tile) const {
        if (OF_LANES || (!SCALED && !ZEROS)) return;
        const int entry = row(tile, lane) * args.groups;
        const int first = entry + group_of(first_chunk), last = entry + group_of(first_chunk + chunks - 1);
        if (SCALED) {
            uint8_t* const row = to + lane * args.scale_pitch;
            const uint8_t* const from = scale_word(first);
            const int bytes = int(scale_word(last) - from) + 4;
            if (args.small_units)
                for (int i = 0; i < bytes; i += 16) copy_async_if(true, row + i, from + i);
            else
                for (int i = 0; i < bytes; i += 4) copy_async4(row + i, from + i);
        }
        if (ZEROS) {
            uint8_t* const row = to + 32 * args.scale_pitch + lane * args.zero_pitch;
            const uint8_t* const from = zero_word(first);
            const int bytes = int(zero_word(last) - from) + 4;
            for (int i = 0; i < bytes; i += 4) copy_async4(row + i, from + i);
        }
    }

    LLMKERN_DEVICE void small_of(Rows& rows, int tile, const uint8_t* at) const {
        if (!SCALED && !ZEROS) return;
#pragma unroll
        for (int r = 0; r < RING_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int in_tile = 16 * r + 8 * h + g, entry = row(tile, in_tile) * args.groups;
                rows.entry[r][h] = entry;
                const int first = entry + group_of(first_chunk);
                rows.scale[r][h] = at + in_tile * args.scale_pitch + (wide() ? 0 : (first & 1) * 2);
                rows.zero[r][h] = at + 32 * args.scale_pitch + in_tile * args.zero_pitch + (first & 3);
            }
    }

    // chunk: of this warp's.
    LLMKERN_DEVICE void ask(uint8_t* slot, int tile, int chunk, Barrier* there) const {
        if (lane == 0) {
            barrier_expect(there, 1024 * RING_TILES);
            copy_tile(slot, codes, (first_chunk + chunk) * 64, tile * 16 * RING_TILES, there);
        }
        if (!OF_LANES) return;
        const int group = group_of(first_chunk + chunk);
#pragma unroll
        for (int i = 0; i < 2 * RING_TILES; i++) {
            const int entry = row(tile, i * 8 + g) * args.groups + group;
            copy_async4(slot + SCALE_AT + i * 128 + lane * 4, scale_word(entry));
            if (ZEROS) copy_async4(slot + ZERO_AT + i * 128 + lane * 4, zero_word(entry));
        }
    }

    LLMKERN_DEVICE uint32_t entry_of(const uint8_t* at, int r, int h) const {
        return *reinterpret_cast<const uint32_t*>(at + (2 * r + h) * 128 + lane * 4);
    }

    LLMKERN_DEVICE float scale_of(const uint8_t* slot, const Rows& rows, int r, int h, int group, int from) const {
        if (OF_LANES) {
            const uint32_t word = entry_of(slot + SCALE_AT, r, h);
            return bits_to_float(wide() ? word : word >> 16 * ((rows.entry[r][h] + group) & 1), args.scales_dtype);
        }
        const uint8_t* const at = rows.scale[r][h] + from * scale_size();
        return bits_to_float(wide() ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at),
                             args.scales_dtype);
    }
    LLMKERN_DEVICE float zero_of(const uint8_t* slot, const Rows& rows, int r, int h, int group, int from) const {
        if (OF_LANES) return int8_t(entry_of(slot + ZERO_AT, r, h) >> 8 * ((rows.entry[r][h] + group) & 3));
        return *reinterpret_cast<const int8_t*>(rows.zero[r][h] + from);
    }

    template <int PIECE>
    LLMKERN_DEVICE void load_x(uint32_t (&b)[TOKEN_TILES][PIECE_WORDS][PAIRS], const uint8_t* x) const {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
            const int token = smaller(8 * t + g, args.tokens - 1);
            const Words4 piece = *reinterpret_cast<const Words4*>(x + token * args.x_pitch + c * LANE * 2 + PIECE * 16);
#pragma unroll
            for (int i = 0; i < PIECE_WORDS; i++) {
#pragma unroll
                for (int j = 0; j < PAIRS; j++) b[t][i][j] = piece.w[i * PAIRS + j];
                Format::arrange(b[t][i]);
            }
        }
    }

    // chunk: of this warp's; x: of the chunk.
    LLMKERN_DEVICE void multiply(float (&acc)[RING_TILES][TOKEN_TILES][4], const uint8_t* slot, const Rows& rows,
                                 int chunk, const uint8_t* x) const {
        Operands of;
        const int group = group_of(first_chunk + chunk), from = OF_LANES ? 0 : group - group_of(first_chunk);
#pragma unroll
        for (int r = 0; r < RING_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                of.w[r][h] = *reinterpret_cast<const Words4*>(slot + (2 * r + h) * 512 + g * 64 + (c ^ (g >> 1)) % 4 * 16);
                if (SCALED) of.scale[r][h] = scale_of(slot, rows, r, h, group, from);
                if (ZEROS) of.zero[r][h] = zero_of(slot, rows, r, h, group, from);
            }
        float sums[RING_TILES][TOKEN_TILES][4] = {}, totals[TOKEN_TILES][4] = {};
        multiply_pieces<0>(sums, totals, of, x);
#pragma unroll
        for (int r = 0; r < RING_TILES; r++)
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float sum = sums[r][t][i];
                    if (TOTALS) sum -= (ZEROS ? BIAS + of.zero[r][i / 2] : BIAS) * totals[t][i % 2];
                    acc[r][t][i] += SCALES == RingScales::SUMS ? of.scale[r][i / 2] * sum : sum;
                }
    }

    struct Operands {
        Words4 w[RING_TILES][2];
        float scale[RING_TILES][2], zero[RING_TILES][2];
    };

    template <int PIECE>
    LLMKERN_DEVICE void multiply_pieces(float (&sums)[RING_TILES][TOKEN_TILES][4], float (&totals)[TOKEN_TILES][4],
                                        const Operands& of, const uint8_t* x) const {
        if constexpr (PIECE < PIECES) {
            uint32_t b[TOKEN_TILES][PIECE_WORDS][PAIRS];
            load_x<PIECE>(b, x);
#pragma unroll
            for (int i = 0; i < PIECE_WORDS; i++) {
                constexpr int WORD = PIECE * PIECE_WORDS;
                if constexpr (TOTALS) {
                    constexpr uint32_t ones[4] = {Magic<T>::ONE, Magic<T>::ONE, Magic<T>::ONE, Magic<T>::ONE};
#pragma unroll
                    for (int j = 0; j < PAIRS; j += 2)
#pragma unroll
                        for (int t = 0; t < TOKEN_TILES; t++) mma<T>(totals[t], ones, b[t][i][j], b[t][i][j + 1]);
                }
#pragma unroll
                for (int r = 0; r < RING_TILES; r++) {
                    uint32_t pairs[2][PAIRS];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        if constexpr (OF_LANES) {
                            const auto offset = Format::template offset<T>(ZEROS ? int(of.zero[r][h]) : 0);
                            Format::template decode<T>(of.w[r][h].w[WORD + i], offset, pairs[h]);
                            const uint32_t factor = pack2<T>(of.scale[r][h], of.scale[r][h]);
#pragma unroll
                            for (int j = 0; j < PAIRS; j++) pairs[h][j] = fma2<T>(pairs[h][j], factor, MINUS_ZERO);
                        } else {
                            Format::template decode_raw<T>(of.w[r][h].w[WORD + i], pairs[h]);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < PAIRS; j += 2) {
                        const uint32_t a[4] = {pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1]};
#pragma unroll
                        for (int t = 0; t < TOKEN_TILES; t++) mma<T>(sums[r][t], a, b[t][i][j], b[t][i][j + 1]);
                    }
                }
            }
            multiply_pieces<PIECE + 1>(sums, totals, of, x);
        }
    }

    LLMKERN_DEVICE float finished(float sum, int64_t row) const {
        return SCALED ? sum : sum * load_float(args.scales, row, args.scales_dtype);
    }
};

}  // namespace llmkern::cuda
