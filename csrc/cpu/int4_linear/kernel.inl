// int4 weights: activations kept (the fp32 driver over rows of nibbles) or quantized to int8 (the integer driver).
#include "cpu/int4_linear/int4_linear.h"
#include "cpu/linear/driver.h"
#include "cpu/linear/integer.h"

namespace llmkern::LLMKERN_NS {
namespace {

// A chunk is WIDTH bytes: its low nibbles are the even columns, its high nibbles the odd ones.
template <bool REGULAR>
struct Int4Source {
    static constexpr int VECTORS = 2;
    static constexpr int column(int p) { return p < F32::WIDTH ? 2 * p : 2 * (p - F32::WIDTH) + 1; }
    using Scales = GroupScales<REGULAR, Int4Source>;

    struct Cursor {
        const uint8_t* bytes;
        typename Scales::Cursor scales;
        NibbleGrid grid;
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
    }

    LLMKERN_INLINE_MEMBER void group(Cursor& at) const {
        if (!REGULAR) return;
        float scale, zero;
        scales.take(at.scales, scale, zero);
        at.grid.set(scale, zero);
    }

    LLMKERN_INLINE_MEMBER void next(Cursor& at, F32 (&w)[VECTORS]) const {
        prefetch(at.bytes + PREFETCH_AHEAD);
        decode(at, at.bytes, w);
        at.bytes += F32::WIDTH;
    }

    LLMKERN_INLINE_MEMBER void last(Cursor& at, F32 (&w)[VECTORS], int columns) const {
        uint8_t part[F32::WIDTH] = {};
        for (int i = 0; i < (columns + 1) / 2; ++i) part[i] = at.bytes[i];
        decode(at, part, w);
    }

    LLMKERN_INLINE_MEMBER void decode(Cursor& at, const uint8_t* from, F32 (&w)[VECTORS]) const {
        at.grid.load(from, w[0], w[1]);
        if (!REGULAR)
            for (int v = 0; v < VECTORS; ++v) w[v] = scales.look_up(at.scales, w[v]);
    }
};

#ifdef LLMKERN_PAIR_DOT
#include "cpu/int4_linear/pairs.inl"
#endif

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
#ifdef LLMKERN_CODE_STREAM
    if (run_codes<NibbleCodes>(a, groups, args.nibbles, row_bytes)) return;
#endif
#ifdef LLMKERN_PAIR_STREAM
    if (run_pair_stream(a, groups, Int4Pairs{args.nibbles, row_bytes})) return;
#endif
#ifdef LLMKERN_PAIR_DOT
    if (takes_pairs(a, groups)) return run_pairs(a, groups, Int4Pairs{args.nibbles, row_bytes});
#endif
    using Regular = Int4Source<true>;
    using Irregular = Int4Source<false>;
    if (Regular::Scales::regular(groups))
        run_linear(a, Regular{args.nibbles, row_bytes, Regular::Scales(groups)});
    else
        run_linear(a, Irregular{args.nibbles, row_bytes, Irregular::Scales(groups)});
}

}  // namespace llmkern::LLMKERN_NS
