// Sixteen rows of kept values and bits, made dense by a warp in its own piece of shared memory, 64 columns at a time.
//
// Half of the warp takes a row, every lane four of its columns: a nibble of the bits, and as many neighbouring values,
// which begin where the bits before them say. So a row's values are read in their order, by neighbouring lanes. The
// values of a chunk are on their way while the chunk before it is multiplied, and the bits one chunk earlier.
#pragma once

#include "cuda/common/divisor.h"
#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/reduce.h"
#include "cuda/sparse/kept.h"

namespace llmkern::cuda {

struct MaskedArgs {
    const void* x;
    const void* values;
    const uint8_t* bits;
    const int64_t* row_offsets;
    const void* scales;
    DType scales_dtype;
    int groups;
    Divisor group_size;
    int k;
    int splits;
    Output out;
};

constexpr int MASK_CHUNK = 64;       // columns
constexpr int MASK_ROW_BYTES = 144;  // of a dense row: 128 and what keeps rows off each other's banks
constexpr int MASK_TILE_BYTES = 16 * MASK_ROW_BYTES;

// Value: uint16_t (bits of a T) or int8_t. ALIGNED: rows of bits start at multiples of 8 bytes.
template <class Value, class T, Scaled SCALED, bool ALIGNED>
struct MaskedRows {
    static constexpr int PAIRS = 8;  // of rows

    const MaskedArgs& args;
    const int64_t first_row;
    const int lane = thread() % 32, half = lane / 16, quad = lane % 16;
    const Value* const values;  // of first_row
    // Of row lane % 16: the bits of the chunk to be loaded next, and how many values come before it.
    Words2 bits{};
    int before = 0;
    uint32_t loaded[PAIRS][4];

    LLMKERN_DEVICE MaskedRows(const MaskedArgs& args, int64_t first_row)
        : args(args),
          first_row(first_row),
          values(static_cast<const Value*>(args.values) + args.row_offsets[smaller(first_row, args.out.n)]) {}

    LLMKERN_DEVICE Words2 load_bits(int chunk) const {
        const int64_t row = first_row + lane % 16;
        const int row_bytes = (args.k + 7) / 8, byte = chunk * MASK_CHUNK / 8;
        Words2 v{};
        if (row >= args.out.n) return v;
        const uint8_t* const at = args.bits + row * row_bytes + byte;
        if constexpr (ALIGNED) {
            if (byte < row_bytes) v = *reinterpret_cast<const Words2*>(at);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (byte + i < row_bytes) v.w[i / 4] |= uint32_t(at[i]) << i % 4 * 8;
        }
        return v;
    }

    // Bits set in the chunks from `from` to `to` of row lane % 16; each half of the warp counts every second chunk.
    LLMKERN_DEVICE int count(int from, int to) const {
        int sum = 0;
        for (int chunk = from + half; chunk < to; chunk += 2) {
            const Words2 v = load_bits(chunk);
            sum += popcount(v.w[0]) + popcount(v.w[1]);
        }
        return sum + shuffle_xor(sum, 16);
    }

    // `counted`: bits set in the row before this chunk.
    LLMKERN_DEVICE void start(int chunk, int counted) {
        const int64_t row = smaller(first_row + lane % 16, args.out.n), first = smaller(first_row, args.out.n);
        before = counted + int(args.row_offsets[row] - args.row_offsets[first]);
        bits = load_bits(chunk);
    }

    LLMKERN_DEVICE void load(int chunk) {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int row = 2 * p + half;
            const uint32_t low = shuffle(bits.w[0], row), high = shuffle(bits.w[1], row);
            const uint32_t word = quad < 8 ? low : high, shift = quad % 8 * 4;
            int at = shuffle(before, row) + popcount(word & ((1u << shift) - 1)) + (quad < 8 ? 0 : popcount(low));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool kept = word >> (shift + i) & 1;
                loaded[p][i] = kept ? uint32_t(values[at]) : 0;
                at += kept;
            }
        }
        before += popcount(bits.w[0]) + popcount(bits.w[1]);
        bits = load_bits(chunk + 1);
    }

    LLMKERN_DEVICE float scale(int row, int column) const {
        const int64_t at = smaller<int64_t>(first_row + row, args.out.n - 1) * args.groups;
        return load_float(args.scales, at + args.group_size.divide(smaller(column, args.k - 1)), args.scales_dtype);
    }

    // What was loaded, of this chunk, into the warp's tile.
    LLMKERN_DEVICE void expand(uint8_t* tile, int chunk) const {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int row = 2 * p + half;
            const auto& v = loaded[p];
            Words2 dense;
            if constexpr (std::is_same_v<Value, uint16_t>) {
                dense = {{v[0] | v[1] << 16, v[2] | v[3] << 16}};
            } else {
                float w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) w[i] = float(int(v[i]));
                if (SCALED == Scaled::WEIGHTS) {
                    const int column = chunk * MASK_CHUNK + 4 * quad;
                    float s = scale(row, column);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (i && args.group_size.divisor % 4) s = scale(row, column + i);
                        w[i] *= s;
                    }
                }
                dense = {{pack2<T>(w[0], w[1]), pack2<T>(w[2], w[3])}};
            }
            *reinterpret_cast<Words2*>(tile + row * MASK_ROW_BYTES + quad * 8) = dense;
        }
    }

    // The left factors of a chunk's four products: lane (g, c) takes columns 16c + 4s to 16c + 4s + 3 in product s.
    LLMKERN_DEVICE void factors(const uint8_t* tile, uint32_t (&a)[4][4]) const {
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const Words4 v =
                    *reinterpret_cast<const Words4*>(tile + (g + 8 * h) * MASK_ROW_BYTES + 32 * c + 16 * u);
#pragma unroll
                for (int i = 0; i < 4; i++) a[2 * u + i / 2][i % 2 * 2 + h] = v.w[i];
            }
    }

    // Of the lane's row of sums, or 8 further.
    LLMKERN_DEVICE float scale_of_sums(int h) const {
        return SCALED == Scaled::SUMS ? scale(lane / 4 + 8 * h, 0) : 1.0f;
    }
};

}  // namespace llmkern::cuda
