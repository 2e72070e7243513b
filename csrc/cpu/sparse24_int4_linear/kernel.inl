// 2:4 int4 weights, activations kept: the shared driver over rows of kept codes and positions.
#include "cpu/linear/driver.h"
#include "cpu/sparse24_int4_linear/sparse24_int4_linear.h"

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

template <Order ORDER>
void run(const Sparse24Int4LinearArgs& args) {
    const int64_t k = args.linear.k;
#ifdef LLMKERN_PAIR_DOT
    const GroupArgs groups{args.scales, args.scales_dtype, nullptr, args.group_size, k};
    const TwoOfFourPairs<Kept::I4> weight{
        {}, reinterpret_cast<const uint8_t*>(args.words), ((k + 3) / 4 * 2 + 7) / 8 * 4, args.positions, k};
#ifdef LLMKERN_PAIR_STREAM
    if (run_kept_pairs(args.linear, groups, weight)) return;
#endif
    if (takes_pairs(args.linear, groups)) return run_pairs(args.linear, groups, weight);
#endif
    const TwoOfFourSource<Kept::I4, ORDER> source{reinterpret_cast<const uint8_t*>(args.words),
                                                  ((k + 3) / 4 * 2 + 7) / 8 * 4, args.positions, k,
                                                  kept_scales(args.scales, args.scales_dtype, args.group_size, k)};
    run_sparse(args.linear, source);
}

}  // namespace

void sparse24_int4_linear(const Sparse24Int4LinearArgs& args) {
    if (args.group_size % EXPAND_CHUNK == 0 || args.group_size >= args.linear.k)
        run<Order::FAST>(args);
    else
        run<Order::NATURAL>(args);
}

}  // namespace llmkern::LLMKERN_NS
