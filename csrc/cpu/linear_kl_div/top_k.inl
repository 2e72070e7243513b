// KL(p || q) over the k listed classes of a row and, with a.tail, one more class of all others.
//
// The listed logits are set aside and -inf is written in their place, so that the sums of the row are those of the
// others alone: 1 less the mass of the listed classes would lose what little is left.

struct TopK {
    const int64_t* indices;  // [k]
    const float* log_probs;  // [k]
    const float* logits;     // [k], as read_block gives them
    int64_t k;
};

// Reads the listed logits into `logits` [k], and marks them in the row.
LLMKERN_INLINE TopK mark_listed(const LinearKlDivArgs& a, const Student& s, int64_t i, float* logits) {
    const TopK top{a.indices + i * a.k, a.log_probs + i * a.k, logits, a.k};
    for (int64_t j = 0; j < a.k; ++j) logits[j] = read_one(s.row, top.indices[j]);
    for (int64_t j = 0; j < a.k; ++j)
        if (top.log_probs[j] > -__builtin_inff())
            store_one(s.out, s.row.dtype, s.row.first + top.indices[j], -__builtin_inff());
    return top;
}

// The sums of all classes, from those of the others.
LLMKERN_INLINE Sums with_listed(const TopK& top, Sums sums, float temperature) {
    for (int64_t j = 0; j < top.k; ++j) {
        if (!(top.log_probs[j] > -__builtin_inff())) continue;
        const float x = top.logits[j];
        if (x > sums.max) {
            sums.raise(x, temperature);
            sums.best = top.indices[j];
        } else if (x == sums.max && top.indices[j] < sums.best) {
            sums.best = top.indices[j];
        }
        sums.sum += __builtin_exp(x - sums.max);
        sums.plain += __builtin_exp((x - sums.max) * temperature);
    }
    return sums;
}

float top_k_divergence(const LinearKlDivArgs& a, const Student& s, const TopK& top, const Sums& others, float* blocks) {
    double value = 0, mass = 0;
    for (int64_t j = 0; j < top.k; ++j)
        if (const float lp = top.log_probs[j]; lp > -__builtin_inff()) {
            const double p = __builtin_exp(lp);
            value += p * (lp - (top.logits[j] - s.log_sum));
            mass += p;
        }
    const bool any_others = others.max > LOW;
    const float others_log_sum = any_others ? others.log_sum() : 0;
    double rest = 0;
    if (a.tail && any_others && mass < 1) {
        rest = 1 - mass;
        value += rest * (__builtin_log(rest) - (others_log_sum - s.log_sum));
        mass += rest;
    }
    if (!a.gradient) return static_cast<float>(value);
    // Of the others: mass q_j - rest q_j / sum q, both e^(x - others_log_sum) times a number.
    const double others_q = any_others ? __builtin_exp(others_log_sum - s.log_sum) : 0;
    const F32 factor = set1(static_cast<float>(mass * others_q - rest)), away = set1(others_log_sum);
    float *x = blocks, *d = blocks + 2 * BLOCK;
    for (int64_t start = 0; start < s.row.count; start += BLOCK) {
        const int size = block_size(s.row, start), count = read_block(s.row, start, size, x);
        for (int i = 0; i < count; i += F32::WIDTH) store(d + i, exp(load(x + i) - away) * factor);
        write_block(a, s, x, d, start, size);
    }
    for (int64_t j = 0; j < top.k; ++j) {
        if (!(top.log_probs[j] > -__builtin_inff())) continue;
        const float logit = top.logits[j], q = __builtin_expf(logit - s.log_sum);
        float g =
            (static_cast<float>(mass) * q - __builtin_expf(top.log_probs[j])) * a.divergence_weight / a.temperature;
        if (s.label >= 0) {
            const float plain = __builtin_expf((logit - s.max) * a.temperature) * s.inverse_plain;
            g += a.ce_weight * (plain - (top.indices[j] == s.label));
        }
        if (a.softcap > 0) {
            const float share = logit * a.temperature / a.softcap;
            g *= 1 - share * share;
        }
        store_one(s.out, s.row.dtype, s.row.first + top.indices[j], g);
    }
    return static_cast<float>(value);
}
