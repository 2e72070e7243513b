// int8 weights, activations kept: the shared driver over rows of codes.
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/linear/driver.h"

namespace llmkern::LLMKERN_NS {
namespace {

template <bool REGULAR>
struct Int8Source {
    static constexpr int VECTORS = 2;
    static constexpr int column(int p) { return p; }
    using Scales = GroupScales<REGULAR, Int8Source>;

    struct Cursor {
        const int8_t* codes;
        typename Scales::Cursor scales;
        F32 scale, zero;  // of the group, if REGULAR
    };

    const int8_t* codes;
    int64_t k;
    Scales scales;

    int64_t group_chunks() const { return scales.group_chunks(); }
    int64_t buffer_floats() const { return scales.buffer_floats(); }

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row, float* buffer) const {
        at.codes = codes + row * k;
        at.scale = at.zero = set1(0);
        scales.start(at.scales, row, buffer);
    }

    LLMKERN_INLINE_MEMBER void group(Cursor& at) const {
        if (!REGULAR) return;
        float scale, zero;
        scales.take(at.scales, scale, zero);
        at.scale = set1(scale);
        at.zero = set1(zero);
    }

    LLMKERN_INLINE_MEMBER void next(Cursor& at, F32 (&w)[VECTORS]) const {
        prefetch(at.codes + PREFETCH_AHEAD);
        decode(at, at.codes, w);
        at.codes += VECTORS * F32::WIDTH;
    }

    LLMKERN_INLINE_MEMBER void last(Cursor& at, F32 (&w)[VECTORS], int columns) const {
        int8_t part[VECTORS * F32::WIDTH] = {};
        for (int i = 0; i < columns; ++i) part[i] = at.codes[i];
        decode(at, part, w);
    }

    LLMKERN_INLINE_MEMBER void decode(Cursor& at, const int8_t* from, F32 (&w)[VECTORS]) const {
        for (int v = 0; v < VECTORS; ++v) {
            const F32 code = load_i8(from + v * F32::WIDTH);
            w[v] = REGULAR ? (code - at.zero) * at.scale : scales.look_up(at.scales, code);
        }
    }
};

#ifdef LLMKERN_PAIR_DOT
#include "cpu/int8_linear/pairs.inl"
#endif

}  // namespace

void int8_linear(const Int8LinearArgs& args) {
    const LinearArgs& a = args.linear;
    const GroupArgs groups{args.scales, args.scales_dtype, args.zeros, args.group_size, a.k};
#ifdef LLMKERN_CODE_STREAM
    if (run_codes<ByteCodes>(a, groups, args.codes, a.k)) return;
#endif
#ifdef LLMKERN_PAIR_STREAM
    if (run_pair_stream(a, groups, Int8Pairs{args.codes, a.k})) return;
#endif
#ifdef LLMKERN_PAIR_DOT
    if (takes_pairs(a, groups)) return run_pairs(a, groups, Int8Pairs{args.codes, a.k});
#endif
    using Regular = Int8Source<true>;
    using Irregular = Int8Source<false>;
    if (Regular::Scales::regular(groups))
        run_linear(a, Regular{args.codes, a.k, Regular::Scales(groups)});
    else
        run_linear(a, Irregular{args.codes, a.k, Irregular::Scales(groups)});
}

}  // namespace llmkern::LLMKERN_NS
