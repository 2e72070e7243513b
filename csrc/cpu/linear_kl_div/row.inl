// A row of logits as the kernel reads it: block by block into L1, as fp32, capped and divided by the temperature.

constexpr int BLOCK = 1024;
constexpr float LOW = -1e30f;  // the least logit: two masked classes differ by 0, not by a NaN

struct Row {
    const void* data;
    DType dtype;
    int64_t first, count;  // elements of data
    float softcap, temperature;
};

// to[i] for logits [start, start + count), and LOW up to the next whole vector. Returns how many that makes.
LLMKERN_INLINE int read_block(const Row& row, int64_t start, int count, float* to) {
    const F32 low = set1(LOW), scale = set1(1.0f / row.temperature), cap = set1(row.softcap);
    int i = 0;
    for (; i < count; i += F32::WIDTH) {
        const int lanes = count - i < F32::WIDTH ? count - i : F32::WIDTH;
        const F32 raw = load_as(row.data, row.dtype, row.first + start + i, lanes);
        F32 x = raw;
        if (row.softcap > 0) x = tanh(x / cap) * cap;
        // A NaN is not below LOW, and stays.
        x = select(raw <= low, low, x * scale);
        store(to + i, lanes == F32::WIDTH ? x : select(first_lanes(lanes), x, low));
    }
    return i;
}

LLMKERN_INLINE int block_size(const Row& row, int64_t start) {
    return row.count - start < BLOCK ? static_cast<int>(row.count - start) : BLOCK;
}

// The logit of one class, as read_block gives it.
LLMKERN_INLINE float read_one(const Row& row, int64_t at) {
    float to[F32::WIDTH];
    read_block(row, at, 1, to);
    return to[0];
}

// Sums of e^(x - max), and of e^(T (x - max)): the softmax at the temperature and at 1.
struct Sums {
    float max = LOW;
    int64_t best = 0;  // the first class of logit max
    double sum = 0, plain = 0;

    LLMKERN_INLINE_MEMBER float log_sum() const { return max + logf(sum); }
    LLMKERN_INLINE_MEMBER float log_plain(float temperature) const { return max * temperature + logf(plain); }
    LLMKERN_INLINE_MEMBER void raise(float top, float temperature) {
        sum *= expf(max - top);
        plain *= expf((max - top) * temperature);
        max = top;
    }
    static LLMKERN_INLINE_MEMBER float logf(double x) { return static_cast<float>(__builtin_log(x)); }
    static LLMKERN_INLINE_MEMBER float expf(float x) { return __builtin_expf(x); }
};

LLMKERN_INLINE void add_block(Sums& sums, const float* x, int count, int64_t start, float temperature, bool plain) {
    F32 top = set1(LOW);
    for (int i = 0; i < count; i += F32::WIDTH) top = max(top, load(x + i));
    if (const float high = hmax(top); high > sums.max) {
        sums.raise(high, temperature);
        int64_t at = 0;
        while (x[at] != high) ++at;
        sums.best = start + at;
    }
    const F32 most = set1(sums.max), t = set1(temperature);
    F32 sum = zero(), other = zero();
    for (int i = 0; i < count; i += F32::WIDTH) {
        const F32 less = load(x + i) - most;
        sum = sum + exp(less);
        if (plain) other = other + exp(less * t);
    }
    sums.sum += hsum(sum);
    sums.plain += hsum(plain ? other : sum);
}

// `plain`: the sum at temperature 1 is wanted too, and is another.
LLMKERN_INLINE Sums sums_of(const Row& row, float* block, bool plain) {
    Sums sums;
    for (int64_t start = 0; start < row.count; start += BLOCK) {
        const int count = read_block(row, start, block_size(row, start), block);
        add_block(sums, block, count, start, row.temperature, plain);
    }
    return sums;
}
