// Unstructured sparse weights, activations kept: the shared driver over rows of kept values and bits.
#include "cpu/bitmask_linear/bitmask_linear.h"
#include "cpu/linear/driver.h"

namespace llmkern::LLMKERN_NS {
namespace {

#include "cpu/sparse/scales.inl"

#include "cpu/sparse/skip.inl"

// Not inline: only the last chunks of the whole weight come here.
__attribute__((noinline)) void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i];
}

template <Kept KEPT, Order ORDER>
struct BitmaskSource {
    static constexpr Count COUNT = Count::ANY;
    static constexpr int VECTORS = EXPAND_VECTORS;
    static constexpr int column(int p) { return expanded_column<KEPT, ORDER>(p); }
    static constexpr int64_t VALUE_BYTES = kept_bytes(KEPT, EXPAND_CHUNK);
    static constexpr int64_t BIT_BYTES = EXPAND_CHUNK / 8;

    struct Cursor {
        const uint8_t* values;
        const uint8_t* bits;
        ScaleCursor<ORDER> scales;
    };

    const uint8_t* values;
    const uint8_t* values_end;
    const uint8_t* bits;
    const int64_t* row_offsets;
    int64_t k;
    KeptScales scales;

    int64_t group_chunks() const { return scale_group_chunks<ORDER>(scales); }
    int64_t buffer_floats() const { return scale_buffer_floats<ORDER>(scales); }

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row, float* buffer) const {
        at.values = values + kept_bytes(KEPT, row_offsets[row]);
        at.bits = bits + row * ((k + 7) / 8);
        start_scales(scales, at.scales, row, buffer);
    }

    LLMKERN_INLINE_MEMBER void group(Cursor& at) const { next_group(scales, at.scales); }

    LLMKERN_INLINE_MEMBER void next(Cursor& at, F32 (&w)[VECTORS]) const {
        for (int64_t i = 0; i < VALUE_BYTES / 2; i += 64) prefetch(at.values + PREFETCH_AHEAD + i);
        prefetch(at.bits + PREFETCH_AHEAD / (VALUE_BYTES / 2 / BIT_BYTES));
        decode(at, next_bits(at), w);
    }

    LLMKERN_INLINE_MEMBER void last(Cursor& at, F32 (&w)[VECTORS], int columns) const {
        decode(at, last_bits(at, columns), w);
    }

    LLMKERN_INLINE_MEMBER uint64_t next_bits(Cursor& at) const {
        uint64_t word = 0;
        __builtin_memcpy(&word, at.bits, BIT_BYTES);  // least significant byte first: little-endian machines only
        at.bits += BIT_BYTES;
        return word;
    }

    LLMKERN_INLINE_MEMBER uint64_t last_bits(const Cursor& at, int columns) const {
        uint64_t word = 0;
        for (int i = 0; i < (columns + 7) / 8; ++i) word |= static_cast<uint64_t>(at.bits[i]) << 8 * i;
        return word & ((uint64_t{1} << columns) - 1);
    }

    // A chunk's values, so many that each of its columns could have one: use(from).
    template <class Use>
    LLMKERN_INLINE_MEMBER void take(Cursor& at, uint64_t word, Use use) const {
        const int64_t bytes = kept_bytes(KEPT, __builtin_popcountll(word));
        uint8_t part[VALUE_BYTES];
        const uint8_t* from = at.values;
        if (__builtin_expect(values_end - from < VALUE_BYTES, false)) {
            copy(part, from, bytes);
            from = part;
        }
        use(from);
        at.values += bytes;
    }

    LLMKERN_INLINE_MEMBER void decode(Cursor& at, uint64_t word, F32 (&w)[VECTORS]) const {
        take(at, word, [&](const uint8_t* from) __attribute__((always_inline)) {
            expand<KEPT, ORDER, Count::ANY>(w, word, from, at.scales.scale);
        });
        if constexpr (ORDER == Order::NATURAL) scale_columns(at.scales, w);
    }

#ifdef LLMKERN_COMPACT
    static constexpr int MOST_KEPT = EXPAND_CHUNK;

    // See skip.inl: prefetches about what the next `columns` columns read.
    LLMKERN_INLINE_MEMBER void ask(const Cursor& at, int columns) const {
        for (int64_t i = 0; i < kept_bytes(KEPT, columns / 2); i += 64) prefetch(at.values + i);
        prefetch(at.bits);
    }

    LLMKERN_INLINE_MEMBER int keep(Cursor& at, float* w, uint16_t* places, int first, int stride) const {
        return keep_bits(at, next_bits(at), w, places, first, stride);
    }

    LLMKERN_INLINE_MEMBER int keep_last(Cursor& at, float* w, uint16_t* places, int first, int stride,
                                        int columns) const {
        return keep_bits(at, last_bits(at, columns), w, places, first, stride);
    }

    LLMKERN_INLINE_MEMBER int keep_bits(Cursor& at, uint64_t word, float* w, uint16_t* places, int first,
                                        int stride) const {
        int count = 0;
        take(at, word, [&](const uint8_t* from) __attribute__((always_inline)) {
            count = compact<KEPT, Count::ANY>(w, places, word, from, at.scales.scale, first, stride);
        });
        if constexpr (ORDER == Order::NATURAL) {
            for (int i = 0; word; word &= word - 1) w[i++] *= at.scales.next[__builtin_ctzll(word)];
            at.scales.next += EXPAND_CHUNK;
        }
        return count;
    }
#endif
};

#ifdef LLMKERN_PAIR_DOT
#include "cpu/sparse/pairs.inl"

#include "cpu/bitmask_linear/pairs.inl"
#endif

template <Kept KEPT, Order ORDER = Order::FAST>
void run(const BitmaskLinearArgs& args) {
    const auto* values = static_cast<const uint8_t*>(args.values);
#ifdef LLMKERN_PAIR_DOT
    if constexpr (KEPT == Kept::BF16 || KEPT == Kept::I8) {
        const int64_t k = args.linear.k;
        const GroupArgs groups{args.scales, args.scales_dtype, nullptr, args.scales ? args.group_size : k, k};
        const BitmaskPairs<KEPT> weight{
            {}, values, values + kept_bytes(KEPT, args.row_offsets[args.linear.n]), args.bits, args.row_offsets, k};
#ifdef LLMKERN_PAIR_STREAM
        if (run_pair_stream(args.linear, groups, weight)) return;
#endif
        if (takes_pairs(args.linear, groups)) return run_pairs(args.linear, groups, weight);
    }
#endif
    const BitmaskSource<KEPT, ORDER> source{
        values,        values + kept_bytes(KEPT, args.row_offsets[args.linear.n]),
        args.bits,     args.row_offsets,
        args.linear.k, kept_scales(args.scales, args.scales_dtype, args.group_size, args.linear.k)};
    run_sparse(args.linear, source);
}

}  // namespace

void bitmask_linear(const BitmaskLinearArgs& args) {
    switch (args.values_dtype) {
        case DType::F32:
            return run<Kept::F32>(args);
        case DType::BF16:
            return run<Kept::BF16>(args);
        case DType::F16:
            return run<Kept::F16>(args);
        case DType::I8:
            if (args.group_size % EXPAND_CHUNK == 0 || args.group_size >= args.linear.k) return run<Kept::I8>(args);
            return run<Kept::I8, Order::NATURAL>(args);
    }
}

}  // namespace llmkern::LLMKERN_NS
