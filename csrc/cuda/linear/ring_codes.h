// int4 and int8 weights for ring.h. Lane (g, c) uses 16 bytes of rows g, g + 8, g + 16 and g + 24.
//
//   slot    codes [32 rows][64 bytes], swizzled by the copy engine (tensor_map.h)
//   side    with groups smaller than a chunk the scales and the zeros that each lane has, [2 tiles][2][32][4 bytes]
//   each;
//           otherwise these are RingSmall's
//
// Where codes become numbers that are too large by the same for all (BIAS, and a row's zero), the products are made
// with those, and the total of x times what is too much comes off their sum: a product of x with ones has it.
#pragma once

#include "cuda/linear/codes.h"
#include "cuda/linear/ring_small.h"

namespace llmkern::cuda {

template <class Format, class T, int TOKEN_TILES, RingScales SCALES, bool ZEROS>
struct RingCodes {
    static constexpr int TILES = 2;
    static constexpr int LANE = Format::LANE_COLUMNS, CHUNK = 4 * LANE, PIECES = LANE / 8, PAIRS = Format::PAIRS;
    static constexpr int PIECE_WORDS = 4 / PAIRS;  // of w, for 8 columns
    static constexpr bool OF_LANES = SCALES == RingScales::WEIGHTS, SCALED = SCALES != RingScales::ROWS;
    static constexpr float BIAS = Format::template RAW_BIAS<T>;
    // With scales of lanes weights are made whole: a total of x over lanes would have no scale.
    static constexpr bool TOTALS = !OF_LANES && (ZEROS || BIAS != 0);
    static constexpr int SLOT_BYTES = 1024 * TILES, ENTRIES = 256 * TILES;
    static constexpr int SIDE_BYTES = OF_LANES ? ENTRIES * (1 + ZEROS) : 0;
    using Small = RingSmall<CHUNK, TILES, SCALED && !OF_LANES, ZEROS && !OF_LANES>;

    struct Rows : Small::Rows {  // of this lane in a tile
        int entry[TILES][2];
    };

    const RingArgs& args;
    const TensorMap& codes;
    const TensorMap& unused;
    const int first_chunk, chunks;  // of this warp
    const int lane = thread() % 32, g = lane / 4, c = lane % 4;
    const Small small{args, first_chunk, chunks};

    LLMKERN_DEVICE void prefetch(int tile) const {
        if (lane == 0)
            for (int d = 0; d < RING_DEPTH<TOKEN_TILES> && d < chunks; d++)
                prefetch_tile(codes, (first_chunk + d) * 64, tile * 16 * TILES);
    }

    LLMKERN_DEVICE void ask_small(uint8_t* to, int tile) const { small.ask(to, tile); }
    LLMKERN_DEVICE void small_of(Rows& rows, int tile, const uint8_t* at) const {
        small.find(rows, tile, at);
        if constexpr (OF_LANES)
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) rows.entry[i / 2][i % 2] = small.entry(tile, 8 * i + g);
    }

    // Of a chunk of this warp's: this lane's columns may be another group's than other lanes'.
    LLMKERN_DEVICE int lane_group(int chunk) const {
        return args.group_size.divide(smaller((first_chunk + chunk) * CHUNK + c * LANE, args.k - 1));
    }

    // chunk: of this warp's.
    LLMKERN_DEVICE void ask(uint8_t* slot, uint8_t* side, int tile, int chunk, Barrier* there) const {
        if (lane == 0) {
            barrier_expect(there, SLOT_BYTES);
            copy_tile(slot, codes, (first_chunk + chunk) * 64, tile * 16 * TILES, there);
        }
        if (!OF_LANES) return;
        const int group = lane_group(chunk);
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            const int entry = small.entry(tile, i * 8 + g) + group;
            copy_async4(side + i * 128 + lane * 4, small.scale_word(entry));
            if (ZEROS) copy_async4(side + ENTRIES + i * 128 + lane * 4, small.zero_word(entry));
        }
    }

    LLMKERN_DEVICE float scale_of(const uint8_t* side, const Rows& rows, int r, int h, int group) const {
        if (!OF_LANES) return small.scale_of(rows, r, h, group);
        const uint32_t word = *reinterpret_cast<const uint32_t*>(side + (2 * r + h) * 128 + lane * 4);
        return bits_to_float(small.wide() ? word : word >> 16 * ((rows.entry[r][h] + group) & 1), args.scales_dtype);
    }
    LLMKERN_DEVICE float zero_of(const uint8_t* side, const Rows& rows, int r, int h, int group) const {
        if (!OF_LANES) return small.zero_of(rows, r, h, group);
        const uint32_t word = *reinterpret_cast<const uint32_t*>(side + ENTRIES + (2 * r + h) * 128 + lane * 4);
        return int8_t(word >> 8 * ((rows.entry[r][h] + group) & 3));
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
    LLMKERN_DEVICE void multiply(float (&acc)[TILES][TOKEN_TILES][4], const uint8_t* slot, const uint8_t* side,
                                 const Rows& rows, int chunk, const uint8_t* x) const {
        Operands of;
        const int group = OF_LANES ? lane_group(chunk) : small.group(chunk);
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                of.w[r][h] =
                    *reinterpret_cast<const Words4*>(slot + (2 * r + h) * 512 + g * 64 + (c ^ (g >> 1)) % 4 * 16);
                if (SCALED) of.scale[r][h] = scale_of(side, rows, r, h, group);
                if (ZEROS) of.zero[r][h] = zero_of(side, rows, r, h, group);
            }
        float sums[TILES][TOKEN_TILES][4] = {}, totals[TOKEN_TILES][4] = {};
        multiply_pieces<0>(sums, totals, of, x);
#pragma unroll
        for (int r = 0; r < TILES; r++)
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
        Words4 w[TILES][2];
        float scale[TILES][2], zero[TILES][2];
    };

    template <int PIECE>
    LLMKERN_DEVICE void multiply_pieces(float (&sums)[TILES][TOKEN_TILES][4], float (&totals)[TOKEN_TILES][4],
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
                for (int r = 0; r < TILES; r++) {
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
