// Lanes are rows. A tile of ROWS rows is transposed into the first-level cache, [b][ROWS], where a column is VECTORS
// vectors. CHUNK columns are worked in registers, one after the other; then every column after them takes the feedback
// of all of them in one pass:
//
//             done      chunk            after
//   tile  | . . . . . | c c c c c c c c | x x x x x x ...      x_j += sum_i d_i v[i, j], d_i = w_i - q_i in registers
//
// so that a load and a store of x_j are worth CHUNK multiply-adds.
#include <utility>

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/columns/columns.h"

namespace llmkern::LLMKERN_NS {
namespace {

#include "cpu/columns/transpose.inl"

constexpr int VECTORS = 2;
constexpr int ROWS = VECTORS * F32::WIDTH;
constexpr int CHUNK = vector_registers(F32::WIDTH) == 32 ? 8 : 4;  // CHUNK * VECTORS differences in 32 or 16 registers

struct Tile {
    float* w;       // [b][ROWS], overwritten by q
    float* wc;      // [b][ROWS]
    float* keep;    // [b][ROWS] 1 = kept, 0 = pruned; null if nothing is pruned
    float* scales;  // [slots][ROWS]
    float* zeros;   // [slots][ROWS]
    float* spare;   // [2 * prune_m][ROWS]
};

// Each column's row of Tile::scales: its group, or its own where that makes the smaller table.
LLMKERN_INLINE bool slot_per_group(const ColumnArgs& a) { return a.groups <= a.b; }

LLMKERN_INLINE int64_t slots(const ColumnArgs& a) { return a.bits == 0 ? 0 : slot_per_group(a) ? a.groups : a.b; }

LLMKERN_INLINE float* column(float* matrix, int64_t j) { return matrix + j * ROWS; }

// tile[j][r] = from[r][j] for `rows` rows; the rows beyond them are 0.
template <class T>
LLMKERN_INLINE void load_tile(float* tile, const T* from, DType dtype, int64_t b, int rows) {
    constexpr int W = F32::WIDTH;
    for (int r = 0; r < ROWS; r += W)
        for (int64_t j = 0; j < b; j += W) {
            const int columns = b - j < W ? static_cast<int>(b - j) : W;
            F32 x[W];
            for (int i = 0; i < W; ++i) x[i] = r + i < rows ? load_as(from, dtype, (r + i) * b + j, columns) : zero();
            transpose(x);
            for (int i = 0; i < columns; ++i) store(column(tile, j + i) + r, x[i]);
        }
}

// to[r][j] = tile[j][r] for `rows` rows; `put(to, index, x, count)` stores count lanes.
template <class Put>
LLMKERN_INLINE void store_tile(const float* tile, int64_t b, int rows, Put put) {
    constexpr int W = F32::WIDTH;
    for (int r = 0; r < rows; r += W)
        for (int64_t j = 0; j < b; j += W) {
            const int columns = b - j < W ? static_cast<int>(b - j) : W;
            F32 x[W];
            for (int i = 0; i < W; ++i) x[i] = i < columns ? load(tile + (j + i) * ROWS + r) : zero();
            transpose(x);
            for (int i = 0; i < W && r + i < rows; ++i) put((r + i) * b + j, x[i], columns);
        }
}

LLMKERN_INLINE void load_grid(const ColumnArgs& a, const Tile& tile, int64_t row, int rows) {
    for (int64_t s = 0; s < slots(a); ++s) {
        const int64_t at = row * a.groups + (slot_per_group(a) ? s : a.group[s]);
        float* scales = column(tile.scales, s);
        float* zeros = column(tile.zeros, s);
        for (int r = 0; r < ROWS; ++r) {
            scales[r] = r < rows ? a.scales[at + r * a.groups] : 1.0f;
            zeros[r] = r < rows && a.zeros ? a.zeros[at + r * a.groups] : 0.0f;
        }
    }
}

// The nearest grid value, in the arithmetic of the reference: a true division, and ties to even.
LLMKERN_INLINE F32 nearest(F32 x, F32 scale, F32 zero_point, F32 low, F32 high) {
    const F32 code = min(max(round_even(x / scale) + zero_point, low), high);
    return (code - zero_point) * scale;
}

// Fills keep for prune_m columns from `start`: their values if all of them were still free, by forward substitution;
// then each is ranked among them by (value * diagonal)^2, equal ones in order, and the prune_n least go.
void choose(const ColumnArgs& a, const Tile& tile, int64_t start) {
    const int m = a.prune_m;
    float* moved = tile.spare;
    float* score = column(tile.spare, m);
    for (int r = 0; r < ROWS; r += F32::WIDTH) {
        for (int k = 0; k < m; ++k) {
            const F32 w = load(column(tile.w, start + k) + r);
            F32 move = load(column(tile.wc, start + k) + r) - w;
            for (int i = 0; i < k; ++i)
                move = move - load(column(moved, i) + r) * set1(a.v[(start + i) * a.b + start + k]);
            store(column(moved, k) + r, move);
            const F32 root = (w + move) * set1(a.diagonal[start + k]);
            store(column(score, k) + r, root * root);
        }
        for (int k = 0; k < m; ++k) {
            const F32 mine = load(column(score, k) + r);
            F32 rank = zero();
            for (int i = 0; i < m; ++i) {
                const F32 other = load(column(score, i) + r);
                const Mask before = i < k ? other <= mine : other < mine;
                rank = rank + select(before, set1(1.0f), zero());
            }
            const Mask kept = rank >= set1(static_cast<float>(a.prune_n));
            store(column(tile.keep, start + k) + r, select(kept, set1(1.0f), zero()));
        }
    }
}

// COUNT columns from `start`: they choose in turn, then feed all columns after them.
template <int COUNT>
void chunk(const ColumnArgs& a, const Tile& tile, int64_t start) {
    const F32 low = set1(-static_cast<float>(1 << a.bits) / 2), high = set1(static_cast<float>(1 << a.bits) / 2 - 1);
    const float* v = a.v + start * a.b;  // rows of the chunk
    F32 difference[COUNT][VECTORS];
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) {
        const int64_t j = start + k;
#pragma GCC unroll 2
        for (int p = 0; p < VECTORS; ++p) {
            const int r = p * F32::WIDTH;
            F32 x = load(column(tile.wc, j) + r);
#pragma GCC unroll 8
            for (int i = 0; i < k; ++i) x = fma(difference[i][p], set1(v[i * a.b + j]), x);
            if (a.bits) {
                const int64_t slot = slot_per_group(a) ? a.group[j] : j;
                x = nearest(x, load(column(tile.scales, slot) + r), load(column(tile.zeros, slot) + r), low, high);
            }
            if (tile.keep) x = select(load(column(tile.keep, j) + r) > zero(), x, zero());
            float* w = column(tile.w, j) + r;
            difference[k][p] = load(w) - x;
            store(w, x);
        }
    }
    for (int64_t j = start + COUNT; j < a.b; ++j) {
        float* x = column(tile.wc, j);
        F32 sum[VECTORS];
#pragma GCC unroll 2
        for (int p = 0; p < VECTORS; ++p) sum[p] = load(x + p * F32::WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
            const F32 factor = set1(v[i * a.b + j]);
#pragma GCC unroll 2
            for (int p = 0; p < VECTORS; ++p) sum[p] = fma(difference[i][p], factor, sum[p]);
        }
#pragma GCC unroll 2
        for (int p = 0; p < VECTORS; ++p) store(x + p * F32::WIDTH, sum[p]);
    }
}

void run_tile(const ColumnArgs& a, const Tile& tile, int64_t row) {
    const int rows = a.n - row < ROWS ? static_cast<int>(a.n - row) : ROWS;
    const int64_t at = row * a.b;
    load_tile(tile.w, a.w + at, DType::F32, a.b, rows);
    load_tile(tile.wc, a.wc + at, DType::F32, a.b, rows);
    if (a.mask) load_tile(tile.keep, a.mask + at, DType::I8, a.b, rows);
    load_grid(a, tile, row, rows);
    // A chunk may not reach beyond an n:m group: the next group is chosen after its feedback.
    const int64_t span = a.prune_m ? a.prune_m : a.b;
    for (int64_t start = 0; start < a.b; start += span) {
        if (a.prune_m) choose(a, tile, start);
        const int64_t stop = start + span;
        int64_t j = start;
        for (; j + CHUNK <= stop; j += CHUNK) chunk<CHUNK>(a, tile, j);
        for (; j + 4 <= stop; j += 4) chunk<4>(a, tile, j);
        for (; j < stop; ++j) chunk<1>(a, tile, j);
    }
    float* q = a.q + at;
    store_tile(tile.w, a.b, rows, [q](int64_t index, F32 x, int count) { store_partial(q + index, x, count); });
    if (!a.keep) return;
    bool* keep = a.keep + at;
    store_tile(tile.keep, a.b, rows, [keep](int64_t index, F32 x, int count) {
        float lanes[F32::WIDTH];
        store(lanes, x);
        for (int i = 0; i < count; ++i) keep[index + i] = lanes[i] != 0.0f;
    });
}

void run_columns(const ColumnArgs& a) {
    const bool prunes = a.mask || a.prune_m;
    const int64_t floats = (a.b * (prunes ? 3 : 2) + slots(a) * 2 + 2 * a.prune_m) * ROWS;
    parallel_for((a.n + ROWS - 1) / ROWS, a.threads, [&](int64_t begin, int64_t end) {
        float* next = scratch_floats(Scratch::TASK, floats);
        const auto take = [&next](int64_t columns) {
            float* taken = next;
            next += columns * ROWS;
            return taken;
        };
        Tile tile{};
        tile.w = take(a.b);
        tile.wc = take(a.b);
        tile.keep = prunes ? take(a.b) : nullptr;
        tile.scales = take(slots(a));
        tile.zeros = take(slots(a));
        tile.spare = take(2 * a.prune_m);
        for (int64_t t = begin; t < end; ++t) run_tile(a, tile, t * ROWS);
    });
}

}  // namespace
}  // namespace llmkern::LLMKERN_NS
