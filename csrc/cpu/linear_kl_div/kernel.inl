// A row is read two or three times: for the sums of both softmaxes, for the divergence and, unless that is KL(p || q),
// for the gradient q_j (g_j - sum_i q_i g_i), g = df/dq, which needs that sum first. Rows are short enough for the
// caches; the products around this kernel take most of the time.
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/linear_kl_div/linear_kl_div.h"
#include "cpu/simd/functions.h"

namespace llmkern::LLMKERN_NS {
namespace {

#include "cpu/linear_kl_div/row.inl"

struct Student {
    Row row;
    void* out;                          // the row's own memory
    int64_t label;                      // -1: none
    float max, log_sum, inverse_plain;  // of its sums
};

// What becomes of the gradient with respect to the scaled logits x of a block: the weights, the cross-entropy's part,
// the softcap's derivative. `to` holds it, and is stored.
LLMKERN_INLINE void write_block(const LinearKlDivArgs& a, const Student& s, const float* x, float* to, int64_t start,
                                int count) {
    const F32 weight = set1(a.divergence_weight / a.temperature), t = set1(a.temperature), most = set1(s.max);
    const bool ce = s.label >= 0 && a.ce_weight > 0;
    const F32 ce_weight = set1(ce ? a.ce_weight * s.inverse_plain : 0.0f);
    for (int i = 0; i < count; i += F32::WIDTH) {
        F32 d = load(to + i) * weight;
        if (ce) d = fma(exp((load(x + i) - most) * t), ce_weight, d);
        store(to + i, d);
    }
    if (ce && s.label >= start && s.label < start + count) to[s.label - start] -= a.ce_weight;
    const F32 ratio = set1(a.softcap > 0 ? a.temperature / a.softcap : 0.0f);
    for (int i = 0; i < count; i += F32::WIDTH) {
        F32 d = load(to + i);
        if (a.softcap > 0) {
            const F32 share = max(set1(-1.0f), load(x + i) * ratio);  // a masked class has LOW
            d = d * (set1(1.0f) - share * share);
        }
        const int lanes = count - i < F32::WIDTH ? count - i : F32::WIDTH;
        store_as(s.out, s.row.dtype, s.row.first + start + i, d, lanes);
    }
}

// Of one class: f(p, q) and df/dq.
struct Terms {
    F32 value, g;
};

template <Divergence KIND>
LLMKERN_INLINE Terms terms(F32 lp, F32 lq, F32 p, F32 q, float mix, float log_ratio, float log_rest) {
    if constexpr (KIND == Divergence::REVERSE_KL) return {q * (lq - lp), lq - lp};
    const F32 rest = set1(1.0f - mix);
    // log(m / q) = log(mix e^(lp - lq) + 1 - mix); beyond e^80 nothing of it changes.
    const F32 apart = min(max(lp - lq, set1(-80.0f)), set1(80.0f));
    const F32 s = apart + set1(log_ratio);
    const F32 above = set1(log_rest) + max(s, zero()) + log1p(exp(zero() - abs(s)));
    if constexpr (KIND == Divergence::JSD)
        return {set1(mix) * p * (apart - above) - rest * q * above, zero() - rest * above};
    if constexpr (KIND == Divergence::SKEW_KL) return {p * (apart - above), zero() - rest * exp(apart - above)};
    return {zero() - q * above, zero() - above - rest * exp(zero() - above)};
}

// One reading of a row: the divergence and sum q g, or the gradient; for KL(p || q) both. `shift`: sum q g.
template <Divergence KIND, bool WRITE>
LLMKERN_INLINE void walk(const LinearKlDivArgs& a, const Student& s, const Row& teacher, float teacher_log_sum,
                         float shift, float* blocks, double& value, double& sum_qg) {
    float *x = blocks, *y = blocks + BLOCK, *d = blocks + 2 * BLOCK;
    const float log_rest = static_cast<float>(__builtin_log1p(-a.mix)), log_ratio = __builtin_logf(a.mix) - log_rest;
    const F32 student_sum = set1(s.log_sum), teacher_sum = set1(teacher_log_sum), away = set1(shift);
    for (int64_t start = 0; start < s.row.count; start += BLOCK) {
        const int size = block_size(s.row, start);
        const int count = read_block(s.row, start, size, x);
        read_block(teacher, start, size, y);
        F32 values = zero(), sums = zero();
        for (int i = 0; i < count; i += F32::WIDTH) {
            const F32 lq = load(x + i) - student_sum, lp = load(y + i) - teacher_sum;
            const F32 q = exp(lq);
            if constexpr (KIND == Divergence::FORWARD_KL) {
                const F32 p = exp(lp);
                values = fma(p, lp - lq, values);
                if constexpr (WRITE) store(d + i, q - p);
                continue;
            }
            const bool needs_p = KIND == Divergence::JSD || KIND == Divergence::SKEW_KL;
            const Terms at = terms<KIND>(lp, lq, needs_p && !WRITE ? exp(lp) : zero(), q, a.mix, log_ratio, log_rest);
            if constexpr (WRITE) {
                store(d + i, q * (at.g - away));
            } else {
                values = values + at.value;
                sums = fma(q, at.g, sums);
            }
        }
        value += hsum(values);
        sum_qg += hsum(sums);
        if constexpr (WRITE) write_block(a, s, x, d, start, size);
    }
}

template <Divergence KIND>
float divergence(const LinearKlDivArgs& a, const Student& s, const Row& teacher, float teacher_log_sum, float* blocks) {
    double value = 0, sum_qg = 0, unused = 0;
    if (KIND == Divergence::FORWARD_KL && a.gradient) {
        walk<KIND, true>(a, s, teacher, teacher_log_sum, 0, blocks, value, unused);
    } else {
        walk<KIND, false>(a, s, teacher, teacher_log_sum, 0, blocks, value, sum_qg);
        if (a.gradient)
            walk<KIND, true>(a, s, teacher, teacher_log_sum, static_cast<float>(sum_qg), blocks, unused, unused);
    }
    return static_cast<float>(value);
}

float divergence_of(const LinearKlDivArgs& a, const Student& s, const Row& teacher, float log_sum, float* blocks) {
    switch (a.kind) {
        case Divergence::FORWARD_KL:
            return divergence<Divergence::FORWARD_KL>(a, s, teacher, log_sum, blocks);
        case Divergence::REVERSE_KL:
            return divergence<Divergence::REVERSE_KL>(a, s, teacher, log_sum, blocks);
        case Divergence::JSD:
            return divergence<Divergence::JSD>(a, s, teacher, log_sum, blocks);
        case Divergence::SKEW_KL:
            return divergence<Divergence::SKEW_KL>(a, s, teacher, log_sum, blocks);
        default:
            return divergence<Divergence::SKEW_REVERSE_KL>(a, s, teacher, log_sum, blocks);
    }
}

#include "cpu/linear_kl_div/top_k.inl"

// Divergence, cross-entropy and agreement of row i.
void run_row(const LinearKlDivArgs& a, int64_t i, float* blocks) {
    Student s{{a.student, a.student_dtype, i * a.v, a.v, a.softcap, a.temperature}, a.student, -1, 0, 0, 0};
    float label_logit = 0;
    if (a.labels) {
        s.label = a.labels[i];
        label_logit = read_one(s.row, s.label) * a.temperature;
    }
    const bool plain = a.labels && a.temperature != 1;
    float* stats = a.stats + 3 * i;
    const auto settle = [&](const Sums& sums) {
        s.max = sums.max, s.log_sum = sums.log_sum(), s.inverse_plain = static_cast<float>(1 / sums.plain);
        stats[1] = a.labels ? sums.log_plain(a.temperature) - label_logit : 0;
    };
    if (a.teacher) {
        const Row teacher{a.teacher, a.teacher_dtype, i * a.v, a.v, a.teacher_softcap, a.temperature};
        const Sums sums = sums_of(s.row, blocks, plain), theirs = sums_of(teacher, blocks, false);
        settle(sums);
        stats[0] = divergence_of(a, s, teacher, theirs.log_sum(), blocks);
        stats[2] = sums.best == theirs.best;
    } else {
        TopK top = mark_listed(a, s, i, blocks + 3 * BLOCK);
        const Sums others = sums_of(s.row, blocks, plain);
        const Sums sums = with_listed(top, others, a.temperature);
        settle(sums);
        stats[0] = top_k_divergence(a, s, top, others, blocks);
        stats[2] = sums.best == a.indices[i * a.k];
    }
}

}  // namespace

void linear_kl_div(const LinearKlDivArgs& a) {
    parallel_for(a.n, a.threads, [&](int64_t begin, int64_t end) {
        float* blocks = scratch_floats(Scratch::TASK, 3 * BLOCK + static_cast<size_t>(a.k));
        for (int64_t i = begin; i < end; ++i) run_row(a, i, blocks);
    });
}

}  // namespace llmkern::LLMKERN_NS
