// A row stays in registers from its first column to its last: LANES lanes of a warp have it, four columns of every
// 4 * LANES each, so that no lane runs out of work before the end. When the first four are done, the others move up:
// the code of every turn is the same, and no index of a register depends on it.
//
//   columns      0..3  4..7  ...            lane 0's  lane 1's ... of its first four registers, then of the next four
//   V' (shared)  a row of V' is read by 16 bytes, the same ones by all rows of a warp
//
// Four columns are chosen by the lane that has them, alone; then their four differences w - q go to the row's other
// lanes, and each lane feeds its later columns. Lanes that do not have the four columns do the same on what they have
// and drop it: a warp waits for its slowest lane anyway.
//
// A row and block of 128 columns takes at least 128 * 127 / 2 = 8128 multiply-adds; here 8384 with two lanes per row,
// 8896 with four, 9920 with eight, because the columns of all lanes are fed until the last of them is done. For 16384
// rows 8128 each are 4.5 us of what 132 multiprocessors can do at 1.75 GHz. Every multiply-add wants a value of V' from
// shared memory, which hands out four bytes per lane and cycle, a quarter of what the multipliers could use; a lane
// with ROWS rows reads it once for all of them. And whatever the number of rows, there is what lies between a column
// and the next: clamping, a quotient, a rounding, two products, one after the other, some 60 cycles, 128 times.
#pragma once

#include "cuda/columns/columns.h"
#include "cuda/common/instructions.h"
#include "cuda/common/values.h"

namespace llmkern::cuda {

constexpr int COLUMN_WARPS = 8;  // at most, in a block

// Floats of shared memory.
constexpr int column_scratch(int columns, Prune prune, int rows_of_block) {
    return columns * columns + 2 * columns + (prune == Prune::GROUPS ? rows_of_block * 2 * MAX_GROUP : 0);
}

// Four columns' values of one row; columns from `count` on are 0.
LLMKERN_DEVICE Floats4 load_columns(const float* at, int count, bool aligned) {
    Floats4 x{};
    if (aligned && count >= 4) {
        const Words4 words = load_shared_use(at);
#pragma unroll
        for (int i = 0; i < 4; i++) x.f[i] = as_float(words.w[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) x.f[i] = at[i];
    }
    return x;
}

// For an index that is not known when this is compiled, as an array of registers cannot be read by one.
template <class V>
LLMKERN_DEVICE V pick(const V (&of)[4], int i) {
    return i == 0 ? of[0] : i == 1 ? of[1] : i == 2 ? of[2] : of[3];
}

// The grids of four columns of a row, made ready for `nearest`.
struct ColumnGrids {
    // Powers of two, 1 unless a scale is near an end of the exponent's range; the same for all four, so that scales
    // below 2^-60 and above 2^47 in one of them are more than it can do.
    float factor, inverse;
    float divisor[4];       // scale * factor
    float reciprocal[4];    // of the divisor
    float low[4], high[4];  // the ends of the grid * factor

    LLMKERN_DEVICE void prepare(const float (&scale)[4], uint32_t zeros, int bits) {
        float least = 1, most = 1;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            least = minimum(least, absolute(scale[i]));
            most = maximum(most, absolute(scale[i]));
        }
        factor = least < 0x1p-60f ? 0x1p80f : most > 0x1p60f ? 0x1p-80f : 1.0f;
        inverse = least < 0x1p-60f ? 0x1p-80f : most > 0x1p60f ? 0x1p80f : 1.0f;
        const int half = 1 << (bits - 1);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int zero = int8_t(zeros >> 8 * i);
            divisor[i] = multiply(scale[i], factor);
            reciprocal[i] = settle(divide(1.0f, divisor[i]));
            const float first = multiply(divisor[i], float(-half - zero));
            const float last = multiply(divisor[i], float(half - 1 - zero));
            low[i] = minimum(first, last);
            high[i] = maximum(first, last);
        }
    }

    // The reference's (clamp(round(x / scale) + zero, ...) - zero) * scale. x at an end of the grid, rounded, is still
    // at that code, so clamping comes first and zero drops out. The quotient: the product is within 1.5 units in the
    // last place of the true one; the correction (Markstein, IBM J. Res. Dev. 34, 1990) rounds a value within 1.5 *
    // 2^-24 of such a unit of it, so it could round otherwise than a division only that close to the middle between two
    // floats, and to another integer only where one of them is an integer and a half. There are a few thousand such
    // pairs x, scale up to powers of two; test_cuda_emulated_solver.py tries them all. Nothing that matters over- or
    // underflows, thanks to the factor.
    LLMKERN_DEVICE float nearest(float x, int i) const {
        const float by = pick(divisor, i), near = pick(reciprocal, i);
        x = minimum(maximum(multiply(x, factor), pick(low, i)), pick(high, i));
        const float product = multiply(x, near);
        const float quotient = multiply_add(multiply_add(-product, by, x), near, product);
        return multiply_add(round_even(quotient), multiply(by, inverse), 0.0f);  // -0 becomes 0
    }
};

template <int COLUMNS, int LANES, int ROWS, Prune PRUNE, bool QUANTIZED>
struct Columns {
    static_assert(COLUMNS % (4 * LANES) == 0 && (PRUNE != Prune::GROUPS || ROWS == 1));
    static constexpr int PARTS = COLUMNS / (4 * LANES);  // fours of columns of one row that a lane has
    static constexpr int WARP_ROWS = 32 / LANES;         // lanes with the same columns of different rows, side by side
    static constexpr uint32_t ALL = 0x01010101;          // a byte for each of four columns: kept

    // What four columns of a row need besides x, as it comes from memory.
    struct Ahead {
        Floats4 w;
        float scale[4];
        uint32_t zeros;  // a byte for each column, as of keep
        uint32_t keep;
    };

    const ColumnArgs& a;
    float* const v = reinterpret_cast<float*>(shared_memory());  // [COLUMNS][COLUMNS], what is not below the diagonal
    float* const diagonal = v + COLUMNS * COLUMNS;
    int32_t* const group = reinterpret_cast<int32_t*>(diagonal + COLUMNS);
    const int lane = thread() % 32, part = lane / WARP_ROWS;
    int64_t row[ROWS];  // among those of all layers
    bool beyond[ROWS];  // the layer has no such row: row[] is its last once more, and is not stored
    float* const moved = diagonal + 2 * COLUMNS + (thread() / 32 * WARP_ROWS + lane % WARP_ROWS) * 2 * MAX_GROUP;
    float* const score = moved + MAX_GROUP;
    float x[ROWS][PARTS][4];  // columns 4 * ((p + q) * LANES + part) + i, compensated so far
    int p = 0;                // the part at hand; what is in registers moves up when the next one's turn comes
    const int parts;
    Ahead ahead[ROWS];
    // Of the four columns that this lane has in the part at hand:
    Floats4 w[ROWS];  // once they are chosen: q
    ColumnGrids grids[ROWS];
    uint32_t keep[ROWS];
    int group_start = 0;

    LLMKERN_DEVICE Columns(const ColumnArgs& args, int warps) : a(args), parts((args.b + 4 * LANES - 1) / (4 * LANES)) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int64_t of_layer =
                ((int64_t(block_x()) * warps + thread() / 32) * ROWS + r) * WARP_ROWS + lane % WARP_ROWS;
            beyond[r] = of_layer >= a.n;
            row[r] = block_y() * a.n + smaller(of_layer, a.n - 1);
        }
    }

    LLMKERN_DEVICE int64_t row_start(int r) const { return row[r] * a.b; }

    LLMKERN_DEVICE void load_shared(int threads) const {
        constexpr int FOURS = COLUMNS / 4;
        const int64_t first = int64_t(block_y()) * a.b;  // of the layer's rows of V' and of its diagonals
        for (int at = thread(); at < COLUMNS * FOURS; at += threads) {
            const int j = at / FOURS, c = at % FOURS * 4;
            if (c + 3 < j || j >= a.b) continue;
            float* const to = v + j * COLUMNS + c;
            const float* const from = a.v + (first + j) * a.b + c;
            if (a.aligned)
                copy_async(to, c < a.b ? from : a.v, c < a.b ? 16 : 0);
            else
                for (int i = 0; i < 4; i++) to[i] = c + i < a.b ? from[i] : 0.0f;
        }
        copy_async_commit();
        for (int j = thread(); j < COLUMNS; j += threads) {
            if (a.diagonal) diagonal[j] = j < a.b ? a.diagonal[first + j] : 0.0f;
            if (QUANTIZED) group[j] = j < a.b ? a.group[j] : 0;
        }
        copy_async_wait<0>();
        sync_block();
    }

    LLMKERN_DEVICE void load_ahead(int of) {
        const int first = 4 * (of * LANES + part), count = a.b - first;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            Ahead& to = ahead[r];
            const int64_t at = row_start(r) + first;
            to.w = load_columns(a.w + at, count, a.aligned);
            if (QUANTIZED) {
                const int64_t start = row[r] * a.groups;
                to.zeros = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    to.scale[i] = 1.0f;
                    if (i >= count) continue;
                    const int64_t at = start + group[first + i];
                    to.scale[i] = a.scales[at];
                    if (a.zeros) to.zeros |= uint32_t(uint8_t(a.zeros[at])) << 8 * i;
                }
            }
            if (PRUNE != Prune::GIVEN) continue;
            to.keep = ALL;
            if (a.mask && count > 0) {
                if (a.aligned) {
                    to.keep = *reinterpret_cast<const uint32_t*>(a.mask + at);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (i < count && !a.mask[at + i]) to.keep &= ~(1u << 8 * i);
                }
            }
        }
    }

    LLMKERN_DEVICE void take_ahead() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            w[r] = ahead[r].w;
            keep[r] = PRUNE == Prune::GIVEN ? ahead[r].keep : 0;
            if (QUANTIZED) grids[r].prepare(ahead[r].scale, ahead[r].zeros, a.bits);
        }
    }

    LLMKERN_DEVICE void store() const {
        const int first = 4 * (p * LANES + part), count = a.b - first;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (beyond[r] || count <= 0) continue;
            const int64_t at = row[r] * a.b + first;
            if (a.aligned) {
                *reinterpret_cast<Floats4*>(a.q + at) = w[r];
                if (a.keep) *reinterpret_cast<uint32_t*>(a.keep + at) = keep[r];
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < count) {
                        a.q[at + i] = w[r].f[i];
                        if (a.keep) a.keep[at + i] = keep[r] >> 8 * i & 1;
                    }
            }
        }
    }

    LLMKERN_DEVICE Floats4 v_of(int j, int c) const { return *reinterpret_cast<const Floats4*>(v + j * COLUMNS + c); }

    // The columns of this part, if it is not done, and of later ones take what COUNT differences of columns from j on
    // feed them.
    template <int COUNT>
    LLMKERN_DEVICE void feed(const float (&difference)[ROWS][COUNT], int j, bool part_done) {
        const float* const from = v + j * COLUMNS + 4 * (p * LANES + part);
#pragma unroll
        for (int q = 0; q < PARTS; q++) {
            if (q == 0 && part_done) continue;
            if (p + q >= parts) break;
            Floats4 factor[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                factor[i] = *reinterpret_cast<const Floats4*>(from + i * COLUMNS + q * 4 * LANES);
#pragma unroll
            for (int i = 0; i < COUNT; i++)
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int k = 0; k < 4; k++) x[r][q][k] = multiply_add(difference[r][i], factor[i].f[k], x[r][q][k]);
        }
    }

    // Which of four columns from j on, of compensated values y, stay: see `choose_group`.
    LLMKERN_DEVICE uint32_t choose_quad(const float (&y)[4], const Floats4& before, const Floats4 (&rows)[3],
                                        int j) const {
        float move[4], points[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            move[k] = subtract(y[k], before.f[k]);
#pragma unroll
            for (int i = 0; i < k; i++) move[k] = multiply_add(-move[i], rows[i].f[k], move[k]);
            const float root = multiply(before.f[k] + move[k], diagonal[j + k]);
            points[k] = multiply(root, root);
        }
        uint32_t stay = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int rank = 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i != k) rank += i < k ? points[i] <= points[k] : points[i] < points[k];
            stay |= uint32_t(rank >= a.prune_n) << 8 * k;
        }
        return stay;
    }

    // Four columns of every row, from j = 4 * (p * LANES + owner) on.
    LLMKERN_DEVICE void four_columns(int owner) {
        const int j = 4 * (p * LANES + owner);
        const Floats4 rows[3] = {v_of(j, j), v_of(j + 1, j), v_of(j + 2, j)};
        float difference[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float y[4], picked[4];
#pragma unroll
            for (int k = 0; k < 4; k++) y[k] = x[r][0][k];
            uint32_t stay = PRUNE == Prune::QUADS ? choose_quad(y, w[r], rows, j) : keep[r];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float value = QUANTIZED ? grids[r].nearest(y[k], k) : y[k];
                picked[k] = stay >> 8 * k & 1 ? value : 0.0f;
                difference[r][k] = subtract(w[r].f[k], picked[k]);
#pragma unroll
                for (int i = k + 1; i < 4; i++) y[i] = multiply_add(difference[r][k], rows[k < 3 ? k : 0].f[i], y[i]);
            }
            if (part == owner) {
                keep[r] = stay;
#pragma unroll
                for (int k = 0; k < 4; k++) w[r].f[k] = picked[k];
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
                difference[r][k] = shuffle(difference[r][k], owner * WARP_ROWS + lane % WARP_ROWS);
        }
        feed<4>(difference, j, owner + 1 == LANES);
    }

    // Which of the prune_m columns from `start` on stay, into `moved`: their values if all of them were still free, by
    // forward substitution; then each is ranked among them by (value * diagonal)^2, equal ones in order, and the
    // prune_n least go. Not fast: it goes through shared memory, a column at a time.
    LLMKERN_DEVICE void choose_group(int start) {
        const int m = a.prune_m;
        const float* const before = a.w + row_start(0) + start;
        sync_warp();
#pragma unroll
        for (int q = 0; q < PARTS; q++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int k = 4 * ((p + q) * LANES + part) + i - start;
                if (k >= 0 && k < m) moved[k] = subtract(x[0][q][i], before[k]);
            }
        for (int i = 0; i < m; i++) {
            sync_warp();
            const float mine = moved[i];
            for (int k = part; k < m; k += LANES)
                if (k > i) moved[k] = multiply_add(-mine, v[(start + i) * COLUMNS + start + k], moved[k]);
        }
        sync_warp();
        for (int k = part; k < m; k += LANES) {
            const float root = multiply(before[k] + moved[k], diagonal[start + k]);
            score[k] = multiply(root, root);
        }
        sync_warp();
        for (int k = part; k < m; k += LANES) {
            int rank = 0;
            for (int i = 0; i < m; i++)
                if (i != k) rank += i < k ? score[i] <= score[k] : score[i] < score[k];
            moved[k] = rank >= a.prune_n;
        }
        sync_warp();
    }

    // The same as `four_columns`, where a group may begin at any of them.
    LLMKERN_DEVICE void column_by_column(int owner) {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            const int j = 4 * (p * LANES + owner) + i;
            if (j >= a.b) return;
            if (j == group_start + a.prune_m) group_start = j;
            if (j == group_start) choose_group(j);
            const bool stays = moved[j - group_start] != 0;
            const float y = pick(x[0][0], i), value = QUANTIZED ? grids[0].nearest(y, i) : y;
            const float picked = stays ? value : 0.0f;
            const float mine = subtract(pick(w[0].f, i), picked);
            const float difference[ROWS][1] = {{shuffle(mine, owner * WARP_ROWS + lane % WARP_ROWS)}};
            if (part == owner) {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (k == i) w[0].f[k] = picked;
                keep[0] |= uint32_t(stays) << 8 * i;
            }
            feed<1>(difference, j, false);
        }
    }

    LLMKERN_DEVICE void run(int threads) {
        load_shared(threads);
        load_ahead(0);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int q = 0; q < PARTS; q++) {
                const int first = 4 * (q * LANES + part);
                const Floats4 loaded = load_columns(a.wc + row_start(r) + first, a.b - first, a.aligned);
#pragma unroll
                for (int i = 0; i < 4; i++) x[r][q][i] = loaded.f[i];
            }
#pragma unroll 1
        for (; p < parts; p++) {
            take_ahead();
            if (p + 1 < parts) load_ahead(p + 1);
#pragma unroll 1
            for (int owner = 0; owner < LANES && 4 * (p * LANES + owner) < a.b; owner++)
                PRUNE == Prune::GROUPS ? column_by_column(owner) : four_columns(owner);
            store();
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int q = 0; q + 1 < PARTS; q++)
#pragma unroll
                    for (int i = 0; i < 4; i++) x[r][q][i] = x[r][q + 1][i];
        }
    }
};

template <int COLUMNS, int LANES, int ROWS, Prune PRUNE, bool QUANTIZED>
__global__ void __launch_bounds__(COLUMN_WARPS * 32) columns_kernel(ColumnArgs args, int warps) {
    Columns<COLUMNS, LANES, ROWS, PRUNE, QUANTIZED> columns(args, warps);
    columns.run(warps * 32);
}

}  // namespace llmkern::cuda
