// The scales of kept integers, symmetric: w = code * scale. Float values have none, and this costs them nothing.
// Included inside namespace llmkern::LLMKERN_NS.

struct KeptScales {
    const void* scales;  // [n, groups] in dtype, or null: float values
    DType dtype;
    int64_t group_size;
    int64_t k;
    int64_t groups;
};

// FAST order: groups are whole chunks (or one per row), so one scale serves a chunk. NATURAL: a row's scales are spread
// over its columns first.
template <Order ORDER>
struct ScaleCursor {
    F32 scale;
    const float* next;
};

inline KeptScales kept_scales(const void* scales, DType dtype, int64_t group_size, int64_t k) {
    return {scales, dtype, group_size, k, (k + group_size - 1) / group_size};
}

template <Order ORDER>
LLMKERN_INLINE int64_t scale_group_chunks(const KeptScales& s) {
    return ORDER == Order::FAST && s.scales && s.groups > 1 ? s.group_size / EXPAND_CHUNK : INT64_MAX;
}

template <Order ORDER>
LLMKERN_INLINE int64_t scale_buffer_floats(const KeptScales& s) {
    if (!s.scales) return 0;
    // Chunks are read whole, and a group is written in whole vectors.
    return ORDER == Order::FAST ? s.groups : s.groups + s.k + 2 * EXPAND_CHUNK;
}

template <Order ORDER>
LLMKERN_INLINE void start_scales(const KeptScales& s, ScaleCursor<ORDER>& at, int64_t row, float* buffer) {
    at.scale = set1(1);
    at.next = buffer;
    if (!s.scales) return;
    convert_row(buffer, s.scales, s.dtype, row * s.groups, s.groups);
    if (ORDER == Order::FAST) return;
    float* columns = buffer + s.groups;
    at.next = columns;
    for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t end = g + 1 < s.groups ? (g + 1) * s.group_size : s.k + EXPAND_CHUNK;
        for (int64_t k = g * s.group_size; k < end; k += F32::WIDTH) store(columns + k, set1(buffer[g]));
    }
}

template <Order ORDER>
LLMKERN_INLINE void next_group(const KeptScales& s, ScaleCursor<ORDER>& at) {
    if (ORDER == Order::FAST && s.scales) at.scale = set1(*at.next++);
}

// Multiplies a chunk in NATURAL order by its columns' scales.
LLMKERN_INLINE void scale_columns(ScaleCursor<Order::NATURAL>& at, F32 (&w)[EXPAND_VECTORS]) {
    for (int v = 0; v < EXPAND_VECTORS; ++v) w[v] = w[v] * load(at.next + v * F32::WIDTH);
    at.next += EXPAND_CHUNK;
}
