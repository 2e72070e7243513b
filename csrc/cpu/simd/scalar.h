// One number between bf16/fp16 bits and float, rounding to nearest even. Included inside a level's namespace (see
// avx2.h), so that no code is shared between files compiled with different flags.

LLMKERN_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

LLMKERN_INLINE float float_from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

LLMKERN_INLINE float from_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

LLMKERN_INLINE uint16_t to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);  // stays a NaN whatever the bits cut off
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

LLMKERN_INLINE float from_f16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude << 13));
    // Exponent and mantissa moved into place give the value times 2^-112, subnormals included.
    return float_from_bits(sign | float_bits(float_from_bits(magnitude << 13) * 0x1p112f));
}

LLMKERN_INLINE uint16_t to_f16(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
    if (magnitude < 0x38800000) {
        // Below 2^-14: adding 1/2 leaves the fp16 subnormal, in units of 2^-24, in the low mantissa bits, rounded.
        return static_cast<uint16_t>(sign | (float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}
