// x to int8 per row and group of columns, symmetric; the definition is ops/int8_dynamic_linear/reference.py.
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

// Quantizes row m of x: codes[k] and scales[ceil(k / group)]. `row` is scratch. Both arrays have room for WIDTH more
// than k elements, which are overwritten. A group that holds NaN or infinity gets the scale NaN.
LLMKERN_INLINE void quantize_row(const LinearArgs& a, int64_t m, int64_t group, float* row, int8_t* codes,
                                 float* scales) {
    constexpr int W = F32::WIDTH;
    convert_row(row, a.x, a.x_dtype, m * a.k, a.k);
    for (int64_t g = 0, k0 = 0; k0 < a.k; ++g, k0 += group) {
        const int64_t count = a.k - k0 < group ? a.k - k0 : group;
        F32 largest = zero(), finite = zero();
        for (int64_t i = 0; i < count; i += W) {
            const F32 x = count - i < W ? load_partial(row + k0 + i, static_cast<int>(count - i)) : load(row + k0 + i);
            largest = max(abs(x), largest);
            finite = fma(x, zero(), finite);
        }
        const float absmax = hmax(largest), inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
        scales[g] = absmax / 127.0f + hsum(finite);
        // Whole vectors: what lies past the group is written again by the next one.
        for (int64_t i = 0; i < count; i += W) {
            const F32 code = round_even(load(row + k0 + i) * set1(inverse));
            store_i8(codes + k0 + i, min(max(code, set1(-127)), set1(127)));
        }
    }
}
