// Loads and stores of vectors of any DType, whole or partial. Included inside a level's namespace after F32.

// The first `count` (0..WIDTH) elements at base[index], converted; the other lanes are 0 and their memory not read.
LLMKERN_INLINE F32 load_as(const void* base, DType dtype, int64_t index, int count = F32::WIDTH) {
    if (dtype == DType::F32) {
        const float* p = static_cast<const float*>(base) + index;
        return count == F32::WIDTH ? load(p) : load_partial(p, count);
    }
    if (dtype == DType::I8) {
        const int8_t* p = static_cast<const int8_t*>(base) + index;
        if (count == F32::WIDTH) return load_i8(p);
        int8_t part[F32::WIDTH] = {};
        for (int i = 0; i < count; ++i) part[i] = p[i];
        return load_i8(part);
    }
    const uint16_t* p = static_cast<const uint16_t*>(base) + index;
    uint16_t part[F32::WIDTH] = {};
    if (count != F32::WIDTH) {
        for (int i = 0; i < count; ++i) part[i] = p[i];
        p = part;
    }
    return dtype == DType::BF16 ? load_bf16(p) : load_f16(p);
}

// Rounds to nearest even and stores the first `count` (0..WIDTH) lanes at base[index]. Float dtypes only.
LLMKERN_INLINE void store_as(void* base, DType dtype, int64_t index, F32 x, int count = F32::WIDTH) {
    if (dtype == DType::F32) {
        float* p = static_cast<float*>(base) + index;
        if (count == F32::WIDTH)
            store(p, x);
        else
            store_partial(p, x, count);
        return;
    }
    uint16_t* p = static_cast<uint16_t*>(base) + index;
    uint16_t part[F32::WIDTH];
    uint16_t* to = count == F32::WIDTH ? p : part;
    if (dtype == DType::BF16)
        store_bf16(to, x);
    else
        store_f16(to, x);
    if (to == part)
        for (int i = 0; i < count; ++i) p[i] = part[i];
}

// One element of a float or int8 array.
LLMKERN_INLINE float load_one(const void* base, DType dtype, int64_t index) {
    switch (dtype) {
        case DType::F32:
            return static_cast<const float*>(base)[index];
        case DType::BF16:
            return from_bf16(static_cast<const uint16_t*>(base)[index]);
        case DType::F16:
            return from_f16(static_cast<const uint16_t*>(base)[index]);
        default:
            return static_cast<const int8_t*>(base)[index];
    }
}

// Rounds to nearest even and stores one element of a float array.
LLMKERN_INLINE void store_one(void* base, DType dtype, int64_t index, float x) {
    switch (dtype) {
        case DType::F32:
            static_cast<float*>(base)[index] = x;
            return;
        case DType::BF16:
            static_cast<uint16_t*>(base)[index] = to_bf16(x);
            return;
        default:
            static_cast<uint16_t*>(base)[index] = to_f16(x);
    }
}

// to[0..count) = from[index..index+count), converted.
static __attribute__((noinline, unused)) void convert_row(float* to, const void* from, DType dtype, int64_t index,
                                                          int64_t count) {
    int64_t i = 0;
    for (; i + F32::WIDTH <= count; i += F32::WIDTH) store(to + i, load_as(from, dtype, index + i));
    for (; i < count; ++i) to[i] = load_one(from, dtype, index + i);
}
