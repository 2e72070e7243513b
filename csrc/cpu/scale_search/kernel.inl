// Lanes are clip ratios: every weight of a group is broadcast once against VECTORS vectors of candidates, so that any
// group size works without a remainder and no sum over lanes is needed.
#include "cpu/scale_search/scale_search.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace llmkern::LLMKERN_NS {
namespace {

constexpr int VECTORS = 4;  // scale, its inverse, and error of each in registers (and low, high where asymmetric)
constexpr int LANES = VECTORS * F32::WIDTH;

struct Candidates {
    float* scale;  // each [padded steps]
    float* zero;
    float* error;
};

struct Range {
    float low, high;  // of a group, with 0 between them
};

LLMKERN_INLINE Range range_of(const float* w, int64_t count) {
    F32 low = zero(), high = zero();
    for (int64_t i = 0; i < count; i += F32::WIDTH) {
        const int lanes = count - i < F32::WIDTH ? static_cast<int>(count - i) : F32::WIDTH;
        const F32 x = lanes == F32::WIDTH ? load(w + i) : load_partial(w + i, lanes);
        low = min(low, x);
        high = max(high, x);
    }
    return {-hmax(zero() - low), hmax(high)};
}

// The grids of every clip ratio, in the arithmetic of the reference.
LLMKERN_INLINE void make_candidates(const ScaleSearchArgs& a, const float* ratios, Range range, int padded,
                                    const Candidates& out) {
    const F32 width = set1(range.high - range.low), low = set1(range.low);
    const F32 top = set1(static_cast<float>((1 << a.bits) - 1)), half = set1(static_cast<float>(1 << (a.bits - 1)));
    for (int i = 0; i < padded; i += F32::WIDTH) {
        const F32 ratio = load(ratios + i);
        F32 scale = width * ratio / top;
        scale = select(scale > zero(), scale, set1(1.0f));
        store(out.scale + i, scale);
        store(out.zero + i, a.symmetric ? zero() : round_even((zero() - low) * ratio / scale) - half);
    }
}

// error[i] = sum over the group of importance * (w - nearest)^2 for LANES candidates from `first`.
template <bool SYMMETRIC>
LLMKERN_INLINE void errors(const ScaleSearchArgs& a, const float* w, const float* importance, int64_t count,
                           const Candidates& at, int first) {
    const F32 half = set1(static_cast<float>(1 << (a.bits - 1))), one = set1(1.0f);
    F32 scale[VECTORS], inverse[VECTORS], low[VECTORS], high[VECTORS], sum[VECTORS];
    for (int p = 0; p < VECTORS; ++p) {
        const int lane = first + p * F32::WIDTH;
        scale[p] = load(at.scale + lane);
        inverse[p] = one / scale[p];
        const F32 shift = SYMMETRIC ? zero() : load(at.zero + lane);
        low[p] = zero() - half - shift;
        high[p] = half - one - shift;
        sum[p] = zero();
    }
    for (int64_t i = 0; i < count; ++i) {
        const F32 x = set1(w[i]), weight = set1(importance[i]);
#pragma GCC unroll 4
        for (int p = 0; p < VECTORS; ++p) {
            const F32 code = min(max(round_even(x * inverse[p]), low[SYMMETRIC ? 0 : p]), high[SYMMETRIC ? 0 : p]);
            const F32 miss = x - code * scale[p];
            sum[p] = fma(miss * miss, weight, sum[p]);
        }
    }
    for (int p = 0; p < VECTORS; ++p) store(at.error + first + p * F32::WIDTH, sum[p]);
}

}  // namespace

void scale_search(const ScaleSearchArgs& a) {
    const int64_t groups = (a.k + a.group_size - 1) / a.group_size;
    const int padded = (a.steps + LANES - 1) / LANES * LANES;
    float* ratios = scratch_floats(Scratch::CALL, padded);
    for (int i = 0; i < padded; ++i)
        ratios[i] = i < a.steps ? static_cast<float>(1 - i * (1 - a.smallest) / a.steps) : 1.0f;
    parallel_for(a.n, a.threads, [&](int64_t begin, int64_t end) {
        float* next = scratch_floats(Scratch::TASK, 3 * padded);
        const Candidates at{next, next + padded, next + 2 * padded};
        for (int64_t row = begin; row < end; ++row)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t start = g * a.group_size;
                const int64_t count = a.k - start < a.group_size ? a.k - start : a.group_size;
                const float* w = a.w + row * a.k + start;
                Range range = range_of(w, count);
                if (a.symmetric) {
                    range.high = range.high > -range.low ? range.high : -range.low;
                    range.low = -range.high;
                }
                make_candidates(a, ratios, range, padded, at);
                int best = 0;
                if (a.steps > 1) {
                    for (int first = 0; first < a.steps; first += LANES)
                        a.symmetric ? errors<true>(a, w, a.importance + start, count, at, first)
                                    : errors<false>(a, w, a.importance + start, count, at, first);
                    for (int i = 1; i < a.steps; ++i)
                        if (at.error[i] < at.error[best]) best = i;
                }
                a.scales[row * groups + g] = at.scale[best];
                a.zeros[row * groups + g] = static_cast<int8_t>(at.zero[best]);
            }
    });
}

}  // namespace llmkern::LLMKERN_NS
