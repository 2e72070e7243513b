// int4 weights: activations kept (the fp32 driver over rows of nibbles) or quantized to int8 (the integer driver).
#include "cpu/int4_linear/int4_linear.h"
#include "cpu/linear/driver.h"
#include "cpu/linear/integer.h"

namespace llmkern::LLMKERN_NS {
namespace {

// Grid: how a level takes nibbles apart. A chunk is WIDTH * VECTORS nibbles, loaded as lanes; vector v holds u - 8 -
// zero of the nibbles v of all lanes, times the scale if SCALED. NibbleGrid has the smallest chunk, WideNibbleGrid the
// fastest.
template <bool REGULAR, class Grid>
struct Int4Source {
    static constexpr int VECTORS = Grid::VECTORS;
    static constexpr int BYTES = VECTORS * F32::WIDTH / 2;
    static constexpr int column(int p) { return Grid::column(p); }
    using Scales = GroupScales<REGULAR, Int4Source>;
    static constexpr bool SCALES_SUMS = REGULAR && !Grid::SCALED;

    struct Cursor {
        const uint8_t* bytes;
        typename Scales::Cursor scales;
        Grid grid;
        F32 scale;  // of the group, if REGULAR
    };

    const uint8_t* nibbles;
    int64_t row_bytes;
    Scales scales;

    int64_t group_chunks() const { return scales.group_chunks(); }
    int64_t buffer_floats() const { return scales.buffer_floats(); }

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row, float* buffer) const {
        at.bytes = nibbles + row * row_bytes;
        scales.start(at.scales, row, buffer);
        at.grid.set(1, 0);
        at.scale = set1(1);
    }

    LLMKERN_INLINE_MEMBER void group(Cursor& at) const {
        if (!REGULAR) return;
        float scale, zero;
        scales.take(at.scales, scale, zero);
        if (Grid::SCALED || scales.has_zeros()) at.grid.set(scale, zero);
        at.scale = set1(scale);
    }

    LLMKERN_INLINE_MEMBER void next(Cursor& at, F32 (&w)[VECTORS]) const {
        prefetch(at.bytes + PREFETCH_AHEAD);
        decode(at, at.bytes, w);
        at.bytes += BYTES;
    }

    LLMKERN_INLINE_MEMBER void last(Cursor& at, F32 (&w)[VECTORS], int columns) const {
        uint8_t part[BYTES] = {};
        for (int i = 0; i < (columns + 1) / 2; ++i) part[i] = at.bytes[i];
        decode(at, part, w);
    }

    struct Raw {
        typename Grid::Raw codes;
        F32 w[REGULAR ? 1 : VECTORS];  // not REGULAR: scaled already
    };

    LLMKERN_INLINE_MEMBER void fetch(Cursor& at, Raw& raw) const {
        prefetch(at.bytes + PREFETCH_AHEAD);
        fetch_from(at, at.bytes, raw);
        at.bytes += BYTES;
    }

    LLMKERN_INLINE_MEMBER void fetch_last(Cursor& at, Raw& raw, int columns) const {
        uint8_t part[BYTES] = {};
        for (int i = 0; i < (columns + 1) / 2; ++i) part[i] = at.bytes[i];
        fetch_from(at, part, raw);
    }

    LLMKERN_INLINE_MEMBER void fetch_from(Cursor& at, const uint8_t* from, Raw& raw) const {
        if constexpr (REGULAR)
            raw.codes = Grid::load(from);
        else
            decode(at, from, raw.w);
    }

    LLMKERN_INLINE_MEMBER F32 vector(const Cursor& at, const Raw& raw, int v) const {
        if constexpr (REGULAR)
            return at.grid.vector(raw.codes, v);
        else
            return raw.w[v];
    }

    LLMKERN_INLINE_MEMBER F32 add(const Cursor& at, F32 sum, F32 total) const {
        return SCALES_SUMS ? fma(at.scale, sum, total) : total + sum;
    }

    LLMKERN_INLINE_MEMBER void decode(Cursor& at, const uint8_t* from, F32 (&w)[VECTORS]) const {
        const typename Grid::Raw codes = Grid::load(from);
        for (int v = 0; v < VECTORS; ++v) {
            w[v] = at.grid.vector(codes, v);
            if (SCALES_SUMS) w[v] = w[v] * at.scale;
            if (!REGULAR) w[v] = scales.look_up(at.scales, w[v]);
        }
    }
};

struct Int4Rows {
    using Dot = Dot4;
    using Tile = Tile4;

    const uint8_t* nibbles;
    int64_t bytes;

    const uint8_t* row(int64_t n) const { return nibbles + n * bytes; }
    int64_t row_bytes() const { return bytes; }

    LLMKERN_INLINE_MEMBER int16_t code(const uint8_t* row, int64_t column) const {
        return static_cast<int16_t>((row[column / 2] >> column % 2 * 4 & 15) - 8);
    }
};

}  // namespace

void int4_linear(const Int4LinearArgs& args) {
    const LinearArgs& a = args.linear;
    const GroupArgs groups{args.scales, args.scales_dtype, args.zeros, args.group_size, a.k};
    const int64_t row_bytes = (a.k + 7) / 8 * 4;
    if (args.int8_activations) return run_integer(a, groups, args.group_size, Int4Rows{args.nibbles, row_bytes});
    using Wide = Int4Source<true, WideNibbleGrid>;
    using Regular = Int4Source<true, NibbleGrid>;
    using Irregular = Int4Source<false, NibbleGrid>;
    // With more rows of x the totals of its short groups would not stay in registers.
    if ((a.m == 1 || a.m > 8) && Wide::Scales::regular(groups))
        run_linear(a, Wide{args.nibbles, row_bytes, Wide::Scales(groups)});
    else if (Regular::Scales::regular(groups))
        run_linear(a, Regular{args.nibbles, row_bytes, Regular::Scales(groups)});
    else
        run_linear(a, Irregular{args.nibbles, row_bytes, Irregular::Scales(groups)});
}

}  // namespace llmkern::LLMKERN_NS
