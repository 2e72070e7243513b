// 2:4 weights times bf16 x without the zeros: which way is taken for how many rows of x. Included inside namespace
// llmkern::LLMKERN_NS.

#include "cpu/sparse/kept_words.inl"

#include "cpu/sparse/gather_pairs.inl"

#include "cpu/sparse/skip_pairs.inl"

// For more rows of x than this, six pairs of x are faster than looking x up.
constexpr int64_t GATHER_ROWS = 12;

// False if the arguments are for another way: groups must end where a step of either does.
template <Kept KEPT>
bool run_kept_pairs(const LinearArgs& a, const GroupArgs& g, const TwoOfFourPairs<KEPT>& w) {
    if (a.x_dtype != DType::BF16 || a.m == 0 || a.k == 0 || !fast_bf16_products()) return false;
    const auto groups_of = [&](int columns) { return g.group_size % columns == 0 || g.group_size >= a.k; };
    if (a.m <= GATHER_ROWS && groups_of(STEP_COLUMNS))
        run_gather_pairs(a, g, w);
    else if (a.m > GATHER_ROWS && groups_of(16))
        run_skip_pairs(a, g, w);
    else
        return false;
    return true;
}
