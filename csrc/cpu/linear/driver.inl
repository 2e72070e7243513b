// y = x @ wᵀ + bias: which way is taken for how many rows of x. Included inside namespace llmkern::LLMKERN_NS by
// linear/driver.h.

// Threads worth waking: one for work that one core does in about the time a wake-up takes (20 us).
LLMKERN_INLINE int worth_threads(const LinearArgs& a) {
    const double vectors = static_cast<double>(a.n) * static_cast<double>(a.k) / F32::WIDTH;
    const double nanoseconds = vectors * (0.5 + 0.15 * static_cast<double>(a.m));
    return nanoseconds < 20e3 ? 1 : a.threads;
}

// y without any columns of x: the bias, or 0.
LLMKERN_INLINE void write_bias(const LinearArgs& a) {
    for (int64_t m = 0; m < a.m; ++m)
        for (int64_t n = 0; n < a.n; ++n) {
            const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n) : 0.0f;
            store_one(a.y, a.x_dtype, m * a.n + n, bias);
        }
}

// y = x @ wᵀ + bias for the weight that `source` decodes.
template <class Source>
void run_linear(const LinearArgs& a, const Source& source) {
    if (a.k == 0) return write_bias(a);
    const int threads = worth_threads(a);
    switch (a.m) {
        case 1:
            return stream<1>(a, source, threads);
        case 2:
            return stream<2>(a, source, threads);
        case 3:
        case 4:
            return stream<4>(a, source, threads);
        case 5:
        case 6:
            return stream<6>(a, source, threads);
        case 7:
        case 8:
            return stream<8>(a, source, threads);
        default:
            return multiply(a, source, threads);
    }
}
