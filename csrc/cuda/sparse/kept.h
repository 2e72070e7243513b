// Rows of 2:4 weights on their way from memory to the registers of a sparse product, in the canonical layout.
//
//   a chunk   what four lanes of a warp take of a row at a time: lane c its run of LANE_COLUMNS columns, which is
//             LANE_BYTES of values and a nibble of positions per quad
//   a part    four quads (16 columns) of every lane's run: two products of 32 columns, whose quads c and 4 + c are the
//             quads 2s and 2s + 1 of lane c's part in product s; one register of positions serves both
//
// Which columns a product takes together is free, as long as x and positions are arranged alike.
#pragma once

#include "cuda/common/divisor.h"
#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/codes.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

struct SparseArgs {
    const void* x;
    const uint8_t* values;
    int row_bytes;
    const uint8_t* positions;
    const void* scales;
    DType scales_dtype;
    int groups;
    Divisor group_size;
    int k;
    int splits;
    Output out;
};

constexpr int PART_COLUMNS = 16;  // of each lane's run
constexpr int PART_PAIRS = 4;

// A quad's pair is taken from a word with a selector: that of the quad's place in the word.

// Values in x's type: a word is a quad's pair.
struct Kept16 {
    static constexpr int LANE_BYTES = 16, LANE_COLUMNS = 16, QUAD_BYTES = 4;
    using Unit = uint16_t;  // positions of a lane's run
    template <class T>
    static LLMKERN_DEVICE void decode(const uint32_t* words, uint32_t (&pairs)[PART_PAIRS]) {
#pragma unroll
        for (int i = 0; i < PART_PAIRS; i++) pairs[i] = words[i];
    }
};

struct KeptInt8 {
    static constexpr int LANE_BYTES = 16, LANE_COLUMNS = 32, QUAD_BYTES = 2;
    using Unit = uint32_t;
    template <class T>
    static LLMKERN_DEVICE uint32_t selector(int quad) {
        return std::is_same_v<T, F16> ? 0x7170 + quad * 0x0202 : 0x1100 + quad * 0x2222;
    }
    template <class T>
    static LLMKERN_DEVICE uint32_t pair(uint32_t word, uint32_t selector) {
        if constexpr (std::is_same_v<T, F16>) {
            // code + 128 is a byte, which 1024 and more hold.
            const uint32_t bytes = permute(word ^ 0x80808080, Magic<T>::PAIR, selector);
            return fma2<T>(bytes, Magic<T>::ONE, pack2<T>(-1152, -1152));
        } else {
            // bf16 has room for seven bits: (128 + code % 128) - (128 or 256).
            const uint32_t bytes = permute(word, word, selector);
            return fma2<T>(mask_or(bytes, 0x00800080, Magic<T>::PAIR), Magic<T>::MINUS_ONE,
                           mask_or(bytes, 0x007f007f, Magic<T>::PAIR));
        }
    }
    template <class T>
    static LLMKERN_DEVICE void decode(const uint32_t* words, uint32_t (&pairs)[PART_PAIRS]) {
#pragma unroll
        for (int i = 0; i < PART_PAIRS; i++) pairs[i] = pair<T>(words[i / 2], selector<T>(i % 2));
    }
};

// 8 bytes, so that a chunk is no longer than the usual group of 128 columns.
struct KeptInt4 {
    static constexpr int LANE_BYTES = 8, LANE_COLUMNS = 32, QUAD_BYTES = 1;
    using Unit = uint32_t;
    template <class T>
    static LLMKERN_DEVICE uint32_t selector(int quad) {
        return 0x4400 + quad * 0x1111;
    }
    template <class T>
    static LLMKERN_DEVICE uint32_t pair(uint32_t word, uint32_t selector) {
        // A byte's lower nibble comes from the word, its upper one from the word moved by 4.
        constexpr uint32_t OFFSET = uint32_t(Magic<T>::NEGATIVE + 8) * 0x00010001;
        const uint32_t nibbles = permute(word, word >> 4, selector);
        return fma2<T>(mask_or(nibbles, 0x000f000f, Magic<T>::PAIR), Magic<T>::ONE, OFFSET);
    }
    template <class T>
    static LLMKERN_DEVICE void decode(const uint32_t* words, uint32_t (&pairs)[PART_PAIRS]) {
#pragma unroll
        for (int i = 0; i < PART_PAIRS; i++) pairs[i] = pair<T>(words[0], selector<T>(i));
    }
};

// A weight times its scale, which comes in two parts so that the weight is rounded once.
struct PairScale {
    uint32_t high, low;
};
template <class T>
LLMKERN_DEVICE PairScale pair_scale(float scale) {
    const uint32_t high = pack2<T>(scale, scale);
    const float rest = scale - to_float<T>(uint16_t(high));
    return {high, pack2<T>(rest, rest)};
}
template <class T>
LLMKERN_DEVICE uint32_t scaled(uint32_t pair, PairScale scale) {
    return fma2<T>(pair, scale.high, fma2<T>(pair, scale.low, MINUS_ZERO));
}

// The nibbles of two runs of four in a word, turned: lane c gets nibble c of each run of lanes 0 to 3.
LLMKERN_DEVICE uint32_t turn_nibbles(uint32_t word) {
    const int c = thread() % 4;
    const uint32_t there = shuffle_xor(word, 1);
    const uint32_t mask = c & 1 ? 0xf0f0f0f0 : 0x0f0f0f0f;
    const uint32_t bytes = (word & mask) | ((c & 1 ? there >> 4 : there << 4) & ~mask);
    return permute(bytes, shuffle_xor(bytes, 2), c & 2 ? 0x3715 : 0x6240);
}

// Where scales go: nowhere, to the sums of a chunk or of a row (in fp32), or to the weights (in T).
enum class Scaled { NOT, SUMS, WEIGHTS };

// 16 * ROW_TILES rows from first_row on. ALIGNED: rows of values and positions start where a lane's loads may.
template <class Format, class T, int ROW_TILES, Scaled SCALED, bool ALIGNED>
struct KeptRows {
    static constexpr int LANE = Format::LANE_COLUMNS, CHUNK = 4 * LANE, PARTS = LANE / PART_COLUMNS;
    static constexpr int WORDS = Format::LANE_BYTES / 4, SCALES = SCALED == Scaled::WEIGHTS ? PARTS : 1;

    struct Stage {
        uint32_t w[ROW_TILES][2][WORDS];
        uint32_t positions[ROW_TILES][2];
        uint32_t scale[ROW_TILES][2][SCALES];  // bits: what becomes of them must not wait for them
    };

    const SparseArgs& args;
    const int64_t first_row;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int position_bytes = (args.k + 7) / 8;

    LLMKERN_DEVICE int64_t row(int r, int h) const {
        return smaller<int64_t>(first_row + 16 * r + 8 * h + g, args.out.n - 1);
    }

    LLMKERN_DEVICE void load_values(uint32_t (&w)[WORDS], int64_t row, int byte) const {
        const uint8_t* const at = args.values + row * args.row_bytes + byte;
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = 0;
        if constexpr (!ALIGNED) {
#pragma unroll
            for (int i = 0; i < 4 * WORDS; i++)
                if (byte + i < args.row_bytes) w[i / 4] |= uint32_t(at[i]) << i % 4 * 8;
        } else if (byte < args.row_bytes) {
            if constexpr (WORDS == 4) {
                const Words4 v = load_once(at);
#pragma unroll
                for (int i = 0; i < 4; i++) w[i] = v.w[i];
            } else {
                const Words2 v = load_once8(at);
                w[0] = v.w[0], w[1] = v.w[1];
            }
        }
    }

    // Beyond the last quad 0 and 1: any legal pair, since the values there are 0.
    LLMKERN_DEVICE uint32_t load_positions(int64_t row, int column) const {
        const uint8_t* const at = args.positions + row * position_bytes;
        if (ALIGNED) {
            if (column >= args.k) return 0x44444444;
            return *reinterpret_cast<const typename Format::Unit*>(at + column / 8);
        }
        uint32_t positions = 0;
#pragma unroll
        for (int i = 0; i < LANE / 4; i++) {
            const int quad = column / 4 + i;
            const uint32_t nibble = 4 * quad < args.k ? at[quad / 2] >> quad % 2 * 4 & 15 : 4;
            positions |= nibble << 4 * i;
        }
        return positions;
    }

    LLMKERN_DEVICE void load(Stage& stage, int chunk) const {
        const int column = chunk * CHUNK + c * LANE, byte = (chunk * 4 + c) * Format::LANE_BYTES;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t at = row(r, h);
                load_values(stage.w[r][h], at, byte);
                stage.positions[r][h] = load_positions(at, column);
            }
        if constexpr (SCALED != Scaled::NOT) {
#pragma unroll
            for (int i = 0; i < SCALES; i++) {
                const int group = args.group_size.divide(smaller(column + i * PART_COLUMNS, args.k - 1));
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        stage.scale[r][h][i] =
                            load_bits(args.scales, row(r, h) * args.groups + group, args.scales_dtype);
            }
        }
    }

    // For each part the register of positions that both its products take, with selectors 0 and 1.
    static LLMKERN_DEVICE void positions(const Stage& stage, int r, uint32_t (&turned)[PARTS]) {
        const uint32_t a = stage.positions[r][0], b = stage.positions[r][1];
        turned[0] = turn_nibbles(permute(a, b, 0x5410));
        if constexpr (PARTS == 2) turned[1] = turn_nibbles(permute(a, b, 0x7632));
    }

    // The left factors of a part's two products.
    LLMKERN_DEVICE void factors(const Stage& stage, int r, int part, uint32_t (&a)[2][4]) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t pairs[PART_PAIRS];
            Format::template decode<T>(stage.w[r][h] + part * WORDS / PARTS, pairs);
            if constexpr (SCALED == Scaled::WEIGHTS) {
                const auto scale = pair_scale<T>(bits_to_float(stage.scale[r][h][part], args.scales_dtype));
#pragma unroll
                for (int i = 0; i < PART_PAIRS; i++) pairs[i] = scaled<T>(pairs[i], scale);
            }
#pragma unroll
            for (int i = 0; i < PART_PAIRS; i++) a[i / 2][i % 2 * 2 + h] = pairs[i];
        }
    }
};

}  // namespace llmkern::cuda
