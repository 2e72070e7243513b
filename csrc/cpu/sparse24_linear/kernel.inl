// 2:4 weights, activations kept: the shared driver over rows of kept values and positions.
#include "cpu/linear/driver.h"
#include "cpu/sparse24_linear/sparse24_linear.h"

namespace llmkern::LLMKERN_NS {
namespace {

#include "cpu/sparse/scales.inl"

#include "cpu/sparse/skip.inl"

#include "cpu/sparse/two_of_four.inl"

#ifdef LLMKERN_PAIR_DOT
#include "cpu/sparse/pairs.inl"

#include "cpu/sparse/two_of_four_pairs.inl"
#endif

#ifdef LLMKERN_PAIR_STREAM
#include "cpu/sparse/kept_pairs.inl"
#endif

template <Kept KEPT, Order ORDER = Order::FAST>
void run(const Sparse24LinearArgs& args) {
    const int64_t k = args.linear.k;
#ifdef LLMKERN_PAIR_DOT
    if constexpr (KEPT == Kept::BF16 || KEPT == Kept::I8) {
        const GroupArgs groups{args.scales, args.scales_dtype, nullptr, args.scales ? args.group_size : k, k};
        const TwoOfFourPairs<KEPT> weight{
            {}, static_cast<const uint8_t*>(args.values), kept_bytes(KEPT, (k + 3) / 4 * 2), args.positions, k};
#ifdef LLMKERN_PAIR_STREAM
        if (run_kept_pairs(args.linear, groups, weight)) return;
#endif
        if (takes_pairs(args.linear, groups)) return run_pairs(args.linear, groups, weight);
    }
#endif
    const TwoOfFourSource<KEPT, ORDER> source{static_cast<const uint8_t*>(args.values),
                                              kept_bytes(KEPT, (k + 3) / 4 * 2), args.positions, k,
                                              kept_scales(args.scales, args.scales_dtype, args.group_size, k)};
    run_sparse(args.linear, source);
}

}  // namespace

void sparse24_linear(const Sparse24LinearArgs& args) {
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
