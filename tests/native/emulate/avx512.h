// The AVX-512 intrinsics (F, BW, DQ, VL, VNNI, VBMI, VBMI2, BF16) that csrc uses, lane by lane. See immintrin.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One function per instruction, not a copy at every use: the copies took the compiler minutes.
#define EMULATED static __attribute__((noinline, unused))

namespace emulate {

// A vector as an array of lanes.
template <class T, int N = 64 / sizeof(T)>
struct Lanes {
    T at[N];

    T& operator[](int i) { return at[i]; }
    const T& operator[](int i) const { return at[i]; }
};

template <class T, class Vector>
static inline Lanes<T, sizeof(Vector) / sizeof(T)> lanes(const Vector& v) {
    Lanes<T, sizeof(Vector) / sizeof(T)> r;
    static_assert(sizeof r == sizeof v, "whole lanes");
    std::memcpy(&r, &v, sizeof r);
    return r;
}

template <class Vector, class T, int N>
static inline Vector pack(const Lanes<T, N>& lanes) {
    Vector v;
    static_assert(sizeof v == sizeof lanes, "whole lanes");
    std::memcpy(&v, &lanes, sizeof v);
    return v;
}

// A vector of N lanes from f(lane).
template <class Vector, class T, class F>
static inline Vector make(F f) {
    Lanes<T, sizeof(Vector) / sizeof(T)> r;
    for (int i = 0; i < static_cast<int>(sizeof(Vector) / sizeof(T)); ++i) r[i] = static_cast<T>(f(i));
    return pack<Vector>(r);
}

static inline bool bit(uint64_t mask, int i) { return mask >> i & 1; }

// ---- loads and stores: a masked lane's memory is not touched ----

template <class Vector>
static inline Vector load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class Vector>
static inline Vector load_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector)) __builtin_trap();
    return load<Vector>(p);
}

template <class Vector>
static inline void store(void* p, Vector v) {
    std::memcpy(p, &v, sizeof v);
}

template <class Vector>
static inline void store_aligned(void* p, Vector v) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector)) __builtin_trap();
    store(p, v);
}

template <class Vector, class T>
EMULATED Vector masked_load(uint64_t mask, const void* p) {
    return make<Vector, T>([&](int i) {
        T x = 0;
        if (bit(mask, i)) std::memcpy(&x, static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
        return x;
    });
}

template <class T, class Vector>
EMULATED void masked_store(void* p, uint64_t mask, Vector v) {
    const auto from = lanes<T>(v);
    for (int i = 0; i < static_cast<int>(sizeof v / sizeof(T)); ++i)
        if (bit(mask, i)) std::memcpy(static_cast<char*>(p) + i * sizeof(T), &from[i], sizeof(T));
}

// ---- any type of lane ----

template <class Vector, class T, class F>
static inline Vector map(Vector a, F f) {
    const auto x = lanes<T>(a);
    return make<Vector, T>([&](int i) { return f(x[i]); });
}

template <class Vector, class T, class F>
static inline Vector map(Vector a, Vector b, F f) {
    const auto x = lanes<T>(a), y = lanes<T>(b);
    return make<Vector, T>([&](int i) { return f(x[i], y[i]); });
}

// The lanes of `from` one after the other to the lanes of the mask.
template <class Vector, class T>
EMULATED Vector expand(Vector other, uint64_t mask, Vector from) {
    const auto x = lanes<T>(other), y = lanes<T>(from);
    int next = 0;
    return make<Vector, T>([&](int i) { return bit(mask, i) ? y[next++] : x[i]; });
}

// Lane `index` of table for each lane, by the low bits of the index.
template <class Vector, class T, class I, class Index>
EMULATED Vector look_up(Index index, Vector table) {
    const auto at = lanes<I>(index);
    const auto x = lanes<T>(table);
    return make<Vector, T>([&](int i) { return x[at[i] & static_cast<I>(sizeof(Vector) / sizeof(T) - 1)]; });
}

// Words of two registers, a below b, by the low six bits of the index.
EMULATED __m512i look_up_words(__m512i a, __m512i index, __m512i b) {
    const auto at = lanes<uint16_t>(index), x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
    return make<__m512i, uint16_t>([&](int i) { return at[i] & 32 ? y[at[i] & 31] : x[at[i] & 31]; });
}

// Within each 128-bit part: x0 y0 x1 y1 of its low or high half.
template <class T>
EMULATED __m512i interleave(__m512i a, __m512i b, bool high) {
    constexpr int PART = 16 / sizeof(T);
    const auto x = lanes<T>(a), y = lanes<T>(b);
    return make<__m512i, T>([&](int i) {
        const int at = i / PART * PART + (high ? PART / 2 : 0) + i % PART / 2;
        return i % 2 ? y[at] : x[at];
    });
}

template <class Part, class Vector>
static inline Part part_of(Vector v, int part) {
    Part r;
    std::memcpy(&r, reinterpret_cast<const char*>(&v) + part * sizeof r, sizeof r);
    return r;
}

template <class Low>
static inline __m512i widen(Low low) {
    __m512i v = {};
    std::memcpy(&v, &low, sizeof low);
    return v;
}

template <class To, class From, class Vector>
EMULATED __m512i convert(Vector v) {
    const auto x = lanes<From>(v);
    return make<__m512i, To>([&](int i) { return x[i]; });
}

// ---- integers ----

EMULATED __m512i shuffle_bytes(__m512i other, uint64_t mask, __m512i table, __m512i index) {
    const auto o = lanes<uint8_t>(other), x = lanes<uint8_t>(table), at = lanes<uint8_t>(index);
    return make<__m512i, uint8_t>([&](int i) {
        if (!bit(mask, i)) return o[i];
        return static_cast<uint8_t>(at[i] & 0x80 ? 0 : x[i / 16 * 16 + (at[i] & 15)]);
    });
}

EMULATED __m512i shuffle_parts(__m512i a, __m512i b, int order) {
    const auto x = lanes<int32_t>(a), y = lanes<int32_t>(b);
    return make<__m512i, int32_t>([&](int i) {
        const int from = (order >> i / 4 * 2 & 3) * 4 + i % 4;
        return i < 8 ? x[from] : y[from];
    });
}

EMULATED __m512i shuffle_dwords(__m512i a, int order) {
    const auto x = lanes<int32_t>(a);
    return make<__m512i, int32_t>([&](int i) { return x[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}

EMULATED __m512i multishift(__m512i shifts, __m512i from) {
    const auto at = lanes<uint8_t>(shifts);
    const auto x = lanes<uint64_t>(from);
    return make<__m512i, uint8_t>([&](int i) {
        const int shift = at[i] & 63;
        const uint64_t word = x[i / 8];
        return shift ? word >> shift | word << (64 - shift) : word;
    });
}

EMULATED __m512i ternary(__m512i a, __m512i b, __m512i c, int table) {
    const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b), z = lanes<uint32_t>(c);
    return make<__m512i, uint32_t>([&](int i) {
        uint32_t r = 0;
        for (int j = 0; j < 32; ++j)
            r |= static_cast<uint32_t>(table >> (bit(x[i], j) << 2 | bit(y[i], j) << 1 | bit(z[i], j)) & 1) << j;
        return r;
    });
}

EMULATED __m512i add_byte_products(__m512i sum, __m512i u, __m512i s) {
    const auto total = lanes<int32_t>(sum);
    const auto x = lanes<uint8_t>(u);
    const auto y = lanes<int8_t>(s);
    return make<__m512i, int32_t>([&](int i) {
        int32_t r = total[i];
        for (int j = 0; j < 4; ++j) r += int32_t{x[4 * i + j]} * y[4 * i + j];
        return r;
    });
}

template <class T, class Vector>
EMULATED T sum_of(Vector v) {
    // Halves are added to each other, as the compiler's reductions do.
    auto x = lanes<T>(v);
    for (int half = static_cast<int>(sizeof v / sizeof(T)) / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
    return x[0];
}

// ---- floats ----

EMULATED __mmask16 compare(__m512 a, __m512 b, int how) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    uint32_t r = 0;
    for (int i = 0; i < 16; ++i) {
        bool yes;
        switch (how) {
            case _CMP_LT_OQ:
                yes = x[i] < y[i];
                break;
            case _CMP_LE_OQ:
                yes = x[i] <= y[i];
                break;
            case _CMP_GT_OQ:
                yes = x[i] > y[i];
                break;
            case _CMP_GE_OQ:
                yes = x[i] >= y[i];
                break;
            case _CMP_EQ_OQ:
                yes = x[i] == y[i];
                break;
            case _CMP_UNORD_Q:
                yes = x[i] != x[i] || y[i] != y[i];
                break;
            default:
                __builtin_trap();
        }
        r |= static_cast<uint32_t>(yes) << i;
    }
    return static_cast<__mmask16>(r);
}

static inline __m512 join(__m256 low, __m256 high) {
    __m512 v;
    std::memcpy(&v, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&v) + sizeof low, &high, sizeof high);
    return v;
}

EMULATED __m512 fused(__m512 a, __m512 b, __m512 c) {
    return join(_mm256_fmadd_ps(part_of<__m256>(a, 0), part_of<__m256>(b, 0), part_of<__m256>(c, 0)),
                _mm256_fmadd_ps(part_of<__m256>(a, 1), part_of<__m256>(b, 1), part_of<__m256>(c, 1)));
}

EMULATED __m512 round_scale(__m512 a, int how) {
    if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
    return map<__m512, float>(a, [](float x) { return std::nearbyint(x); });
}

EMULATED __m512 scale_by_power(__m512 a, __m512 n) {
    return make<__m512, float>([&, x = lanes<float>(a), y = lanes<float>(n)](int i) {
        // The conversion to int wants a number.
        return y[i] != y[i] ? y[i] : std::ldexp(x[i], static_cast<int>(std::fmax(-1e6f, std::fmin(1e6f, y[i]))));
    });
}

EMULATED __m512i round_to_int(__m512 a) {
    return make<__m512i, int32_t>([&, x = lanes<float>(a)](int i) {
        const float r = std::nearbyint(x[i]);
        return r >= -0x1p31f && r < 0x1p31f ? static_cast<int32_t>(r) : INT32_MIN;
    });
}

EMULATED __m512 from_half(__m256i v) {
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}

EMULATED __m256i to_half(__m512 v, int how) {
    if (how != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
    return _mm256_set_m128i(_mm256_cvtps_ph(part_of<__m256>(v, 1), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(part_of<__m256>(v, 0), _MM_FROUND_TO_NEAREST_INT));
}

EMULATED float largest(__m512 v) {
    auto x = lanes<float>(v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

EMULATED __m512 gather(__m512i index, const void* base, int scale) {
    const auto at = lanes<int32_t>(index);
    return make<__m512, float>([&](int i) {
        float x;
        std::memcpy(&x, static_cast<const char*>(base) + int64_t{at[i]} * scale, sizeof x);
        return x;
    });
}

// ---- bf16: the processor takes subnormal factors for 0 and flushes subnormal results, whatever MXCSR says ----

static inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

static inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return flushed(x);
}

static inline float add_product(float sum, float a, float b) { return flushed(std::fma(a, b, flushed(sum))); }

static inline uint16_t to_bf16(float x) {
    x = flushed(x);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of each pair the second product is added first.
EMULATED __m512 add_pair_products(__m512 sum, __m512i a, __m512i b) {
    const auto total = lanes<float>(sum);
    const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
    return make<__m512, float>([&](int i) {
        const float odd = add_product(total[i], from_bf16(x[2 * i + 1]), from_bf16(y[2 * i + 1]));
        return add_product(odd, from_bf16(x[2 * i]), from_bf16(y[2 * i]));
    });
}

EMULATED __m512i to_bf16(__m512 high, __m512 low) {
    const auto x = lanes<float>(low), y = lanes<float>(high);
    return make<__m512i, uint16_t>([&](int i) { return to_bf16(i < 16 ? x[i] : y[i - 16]); });
}

// ---- what is one line ----

EMULATED __m512 set1_ps(float x) {
    return make<__m512, float>([&](int) { return x; });
}
EMULATED __m512i set1_epi8(int x) {
    return make<__m512i, int8_t>([&](int) { return x; });
}
EMULATED __m512i set1_epi32(int x) {
    return make<__m512i, int32_t>([&](int) { return x; });
}
EMULATED __m512i set1_epi64(int64_t x) {
    return make<__m512i, int64_t>([&](int) { return x; });
}
EMULATED __m512i broadcast(__m128i v) {
    return make<__m512i, int32_t>([x = lanes<int32_t>(v)](int i) { return x[i % 4]; });
}

EMULATED __m512i mask_or(__m512i other, uint64_t mask, __m512i a, __m512i b) {
    const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b), o = lanes<uint32_t>(other);
    return make<__m512i, uint32_t>([&](int i) { return bit(mask, i) ? x[i] | y[i] : o[i]; });
}
EMULATED __m512i blend_words(uint64_t mask, __m512i no, __m512i yes) {
    const auto x = lanes<uint16_t>(no), y = lanes<uint16_t>(yes);
    return make<__m512i, uint16_t>([&](int i) { return bit(mask, i) ? y[i] : x[i]; });
}
EMULATED __m512 blend(uint64_t mask, __m512 no, __m512 yes) {
    const auto x = lanes<float>(no), y = lanes<float>(yes);
    return make<__m512, float>([&](int i) { return bit(mask, i) ? y[i] : x[i]; });
}

EMULATED __m512i add_epi32(__m512i a, __m512i b) {
    return map<__m512i, uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
EMULATED __m512i sub_epi32(__m512i a, __m512i b) {
    return map<__m512i, uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
EMULATED __m512i mullo_epi32(__m512i a, __m512i b) {
    return map<__m512i, uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
EMULATED __m512i sub_epi8(__m512i a, __m512i b) {
    return map<__m512i, uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x - y; });
}
template <class T>
EMULATED __m512i shift_left(__m512i v, int n) {
    return map<__m512i, T>(v, [&](T x) { return x << n; });
}
template <class T>
EMULATED __m512i shift_right(__m512i v, int n) {
    return map<__m512i, T>(v, [&](T x) { return x >> n; });
}
EMULATED __m512 min(__m512 a, __m512 b) {
    return map<__m512, float>(a, b, [](float x, float y) { return x < y ? x : y; });
}
EMULATED __m512 max(__m512 a, __m512 b) {
    return map<__m512, float>(a, b, [](float x, float y) { return x > y ? x : y; });
}
EMULATED __m512 abs(__m512 v) {
    return (__m512)map<__m512i, uint32_t>((__m512i)v, [](uint32_t x) { return x & 0x7fffffff; });
}
EMULATED __m512 square_root(__m512 v) {
    return map<__m512, float>(v, [](float x) { return std::sqrt(x); });
}
EMULATED __m512 to_float(__m512i v) {
    return make<__m512, float>([x = lanes<int32_t>(v)](int i) { return x[i]; });
}
EMULATED __m128i to_bytes(__m512i v) {
    return make<__m128i, int8_t>([x = lanes<int32_t>(v)](int i) { return x[i]; });
}
EMULATED __m256i to_words(__m512i v) {
    return make<__m256i, int16_t>([x = lanes<int32_t>(v)](int i) { return x[i]; });
}

}  // namespace emulate

#undef _mm512_setr_ps
#define _mm512_setzero_ps() (__m512{})
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set1_ps emulate::set1_ps
#define _mm512_set1_epi8 emulate::set1_epi8
#define _mm512_set1_epi32 emulate::set1_epi32
#define _mm512_set1_epi64 emulate::set1_epi64
#define _mm512_setr_ps(...) emulate::pack<__m512>(emulate::Lanes<float>{{__VA_ARGS__}})
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) emulate::pack<__m512i>(emulate::Lanes<int32_t>{{__VA_ARGS__}})
#undef _mm512_set4_epi32
#define _mm512_set4_epi32(d, c, b, a) emulate::broadcast(_mm_set_epi32(d, c, b, a))
#define _mm512_broadcast_i32x4 emulate::broadcast

#define _mm512_loadu_ps emulate::load<__m512>
#define _mm512_load_ps emulate::load_aligned<__m512>
#define _mm512_loadu_si512 emulate::load<__m512i>
#define _mm512_load_si512 emulate::load_aligned<__m512i>
#define _mm512_storeu_ps emulate::store<__m512>
#define _mm512_store_ps emulate::store_aligned<__m512>
#define _mm512_storeu_si512 emulate::store<__m512i>
#define _mm512_store_si512 emulate::store_aligned<__m512i>
#define _mm512_maskz_loadu_ps emulate::masked_load<__m512, float>
#define _mm512_maskz_loadu_epi8 emulate::masked_load<__m512i, uint8_t>
#define _mm512_maskz_loadu_epi16 emulate::masked_load<__m512i, uint16_t>
#define _mm_maskz_loadu_epi8 emulate::masked_load<__m128i, uint8_t>
#define _mm256_maskz_loadu_epi16 emulate::masked_load<__m256i, uint16_t>
#define _mm256_maskz_loadu_epi8 emulate::masked_load<__m256i, uint8_t>
#define _mm512_mask_storeu_ps emulate::masked_store<float, __m512>
#define _mm512_mask_storeu_epi16 emulate::masked_store<uint16_t, __m512i>
#define _mm512_mask_storeu_epi32 emulate::masked_store<uint32_t, __m512i>

#define _mm512_castps_si512(v) ((__m512i)(v))
#define _mm512_castsi512_ps(v) ((__m512)(v))
#define _mm512_castsi256_si512 emulate::widen<__m256i>
#define _mm512_zextsi128_si512 emulate::widen<__m128i>
#define _mm512_castsi512_si256(v) emulate::part_of<__m256i>(v, 0)
#define _mm512_castsi512_si128(v) emulate::part_of<__m128i>(v, 0)
#define _mm512_castps512_ps256(v) emulate::part_of<__m256>(v, 0)
#undef _mm512_extracti64x4_epi64
#undef _mm512_extracti32x4_epi32
#undef _mm512_extractf32x8_ps
#define _mm512_extracti64x4_epi64 emulate::part_of<__m256i>
#define _mm512_extracti32x4_epi32 emulate::part_of<__m128i>
#define _mm512_extractf32x8_ps emulate::part_of<__m256>
#define _mm512_cvtss_f32(v) emulate::part_of<float>(v, 0)

#define _mm512_and_si512(a, b) ((__m512i)((a) & (b)))
#define _mm512_or_si512(a, b) ((__m512i)((a) | (b)))
#define _mm512_xor_si512(a, b) ((__m512i)((a) ^ (b)))
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulate::ternary
#define _mm512_mask_or_epi32 emulate::mask_or
#define _mm512_add_epi32 emulate::add_epi32
#define _mm512_mullo_epi32 emulate::mullo_epi32
#define _mm512_sub_epi32 emulate::sub_epi32
#define _mm512_sub_epi8 emulate::sub_epi8
#undef _mm512_slli_epi16
#undef _mm512_srli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_srai_epi32
#define _mm512_slli_epi16 emulate::shift_left<uint16_t>
#define _mm512_srli_epi16 emulate::shift_right<uint16_t>
#define _mm512_slli_epi32 emulate::shift_left<uint32_t>
#define _mm512_srli_epi32 emulate::shift_right<uint32_t>
#define _mm512_srai_epi32 emulate::shift_right<int32_t>
#define _mm512_reduce_add_epi32 emulate::sum_of<int32_t, __m512i>
#define _mm512_dpbusd_epi32 emulate::add_byte_products

#define _mm512_unpacklo_epi32(a, b) emulate::interleave<int32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) emulate::interleave<int32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) emulate::interleave<int64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) emulate::interleave<int64_t>(a, b, true)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulate::shuffle_parts
#define _mm512_shuffle_epi8(table, index) emulate::shuffle_bytes(table, ~uint64_t{0}, table, index)
#define _mm512_mask_shuffle_epi8 emulate::shuffle_bytes
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32 emulate::shuffle_dwords
#define _mm512_permutexvar_ps emulate::look_up<__m512, float, uint32_t, __m512i>
#define _mm512_permutexvar_epi16 emulate::look_up<__m512i, uint16_t, uint16_t, __m512i>
#define _mm512_permutexvar_epi32 emulate::look_up<__m512i, uint32_t, uint32_t, __m512i>
#define _mm512_permutex2var_epi16 emulate::look_up_words
#define _mm512_multishift_epi64_epi8 emulate::multishift
#define _mm512_maskz_expand_ps(mask, from) emulate::expand<__m512, float>(__m512{}, mask, from)
#define _mm512_maskz_expand_epi8(mask, from) emulate::expand<__m512i, uint8_t>(__m512i{}, mask, from)
#define _mm512_mask_expand_epi8 emulate::expand<__m512i, uint8_t>
#define _mm512_maskz_expand_epi16(mask, from) emulate::expand<__m512i, uint16_t>(__m512i{}, mask, from)

#define _mm512_cvtepi8_epi32 emulate::convert<int32_t, int8_t, __m128i>
#define _mm512_cvtepu8_epi32 emulate::convert<int32_t, uint8_t, __m128i>
#define _mm512_cvtepu16_epi32 emulate::convert<int32_t, uint16_t, __m256i>
#define _mm512_cvtepu16_epi64 emulate::convert<int64_t, uint16_t, __m128i>
#define _mm512_cvtepi32_epi8 emulate::to_bytes
#define _mm512_cvtepi32_epi16 emulate::to_words
#define _mm512_cvtepi32_ps emulate::to_float
#define _mm512_cvtps_epi32 emulate::round_to_int
#define _mm512_cvtph_ps emulate::from_half
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulate::to_half

#define _mm512_add_ps(a, b) ((__m512)((a) + (b)))
#define _mm512_sub_ps(a, b) ((__m512)((a) - (b)))
#define _mm512_mul_ps(a, b) ((__m512)((a) * (b)))
#define _mm512_div_ps(a, b) ((__m512)((a) / (b)))
#define _mm512_fmadd_ps emulate::fused
#define _mm512_min_ps emulate::min
#define _mm512_max_ps emulate::max
#define _mm512_abs_ps emulate::abs
#define _mm512_sqrt_ps emulate::square_root
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulate::round_scale
#define _mm512_scalef_ps emulate::scale_by_power
#define _mm512_reduce_add_ps emulate::sum_of<float, __m512>
#define _mm512_reduce_max_ps emulate::largest
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulate::compare
#define _mm512_mask_blend_ps emulate::blend
#define _mm512_mask_blend_epi16 emulate::blend_words
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps emulate::gather
#define _mm512_dpbf16_ps(sum, a, b) emulate::add_pair_products(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtne2ps_pbh(high, low) ((__m512bh)emulate::to_bf16(high, low))
