// x to int8 per row, or per row and group of columns, symmetric: bit by bit as ops/int8_dynamic_linear/reference.py
// defines it. A row (or group) with a NaN or an infinity gets the scale NaN, which reaches its own results only.
#pragma once

#include "cuda/common/instructions.h"
#include "cuda/common/values.h"

namespace llmkern::cuda {

constexpr int X_PAD = 64;  // columns: rows of codes are padded to a multiple of it, with zeros

// The largest magnitude as T's bits without the sign. As integers they are in the order of the magnitudes, then
// infinity, then NaN. `largest` and the result hold one for each half.
LLMKERN_DEVICE uint32_t largest_of(uint32_t largest, const Words4& x) {
#pragma unroll
    for (int i = 0; i < 4; i++) largest = larger_halves(largest, x.w[i] & 0x7fff7fff);
    return largest;
}
LLMKERN_DEVICE int larger_half(uint32_t pair) { return int(pair >> 16 > (pair & 0xffff) ? pair >> 16 : pair & 0xffff); }

// Over `lanes` neighbours, a power of two.
LLMKERN_DEVICE int largest_of_lanes(int value, int lanes) {
    for (int mask = 1; mask < lanes; mask *= 2) {
        const int other = shuffle_xor(value, mask);
        if (other > value) value = other;
    }
    return value;
}

template <class T>
struct Steps {
    float inverse, scale;
    LLMKERN_DEVICE explicit Steps(int largest_bits) {
        const float largest = to_float<T>(uint16_t(largest_bits));
        inverse = largest > 0 ? 127.0f / largest : 0.0f;
        scale = largest / 127.0f + (largest - largest);  // 0, or NaN
    }
};

// The byte of a code is the lowest of this number. Adding 1.5 * 2^23 rounds half to even, as round() does; what is
// between the product and the sum keeps them from being one operation, which would round once instead of twice.
LLMKERN_DEVICE uint32_t code_of(float x, float inverse) {
    return float_bits(minimum(maximum(x * inverse, -127.0f), 127.0f) + 12582912.0f);
}

// Sixteen columns.
template <class T>
LLMKERN_DEVICE Words4 quantize(const Words4& first, const Words4& second, float inverse) {
    Words4 codes;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t* const pairs = (i < 2 ? first : second).w + i % 2 * 2;
        uint32_t half[2];
#pragma unroll
        for (int j = 0; j < 2; j++)
            half[j] = permute(code_of(to_float<T>(uint16_t(pairs[j])), inverse),
                              code_of(to_float<T>(uint16_t(pairs[j] >> 16)), inverse), 0x0040);
        codes.w[i] = permute(half[0], half[1], 0x5410);
    }
    return codes;
}

struct QuantizeArgs {
    const void* x;
    int m, k, padded_k;
    int x_groups, x_group;      // scales of a row, and the columns of each
    int sum_groups, sum_group;  // sums of a row, none if `sums` is null
    int8_t* codes;              // [m, padded_k]
    float* scales;              // [m, x_groups]
    int* sums;                  // [m, sum_groups]: of the codes
    bool by_lanes;              // codes as store_by_lanes puts them, scales as [x_groups, m]
};

// Sixteen columns of a row among 128, which integer_nibbles.h multiplies by lanes: of columns 32c + 8p + 2i + h,
// product p takes byte 16h + 4c + i.
LLMKERN_DEVICE void store_by_lanes(int8_t* row, int piece, const Words4& codes) {
    uint32_t* const to = reinterpret_cast<uint32_t*>(row + piece / 8 * 128) + piece % 2 * 16 + piece % 8 / 2;
#pragma unroll
    for (int word = 0; word < 2; word++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            to[8 * word + 4 * h] = permute(codes.w[2 * word], codes.w[2 * word + 1], h ? 0x7531 : 0x6420);
}

constexpr int QUANTIZE_WARPS = 8;

// A block per row, a thread per 16 columns. Groups are multiples of 16 columns, or one per row.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(QUANTIZE_WARPS * 32) quantize_kernel(QuantizeArgs a) {
    dependency_wait();  // nothing to wait for: the product may start, and wait for the end of this
    const int64_t row = block_x();
    const int pieces = a.padded_k / 16, threads = QUANTIZE_WARPS * 32;
    const uint16_t* const x = static_cast<const uint16_t*>(a.x) + row * a.k;
    int* const of_warp = reinterpret_cast<int*>(shared_memory());
    int* const maxima = of_warp + QUANTIZE_WARPS;  // of a piece
    int* const sums = maxima + pieces;
    int largest = 0;
    for (int p = thread(); p < pieces; p += threads) {
        uint32_t halves = largest_of(0, load_halves<ALIGNED>(x, 16 * p, a.k));
        halves = largest_of(halves, load_halves<ALIGNED>(x, 16 * p + 8, a.k));
        maxima[p] = larger_half(halves);
        if (maxima[p] > largest) largest = maxima[p];
    }
    largest = largest_of_lanes(largest, 32);
    if (thread() % 32 == 0) of_warp[thread() / 32] = largest;
    sync_block();
    if (a.x_groups == 1) {
#pragma unroll
        for (int w = 0; w < QUANTIZE_WARPS; w++)
            if (of_warp[w] > largest) largest = of_warp[w];
    }
    for (int p = thread(); p < pieces; p += threads) {
        const int group = a.x_groups == 1 ? 0 : smaller(16 * p / a.x_group, a.x_groups - 1);
        const int first = group * (a.x_group / 16);
        if (a.x_groups > 1) {
            largest = 0;
            for (int i = first; i < first + a.x_group / 16 && i < pieces; i++)
                if (maxima[i] > largest) largest = maxima[i];
        }
        const Steps<T> steps(largest);
        if (p == first) a.scales[a.by_lanes ? group * int64_t(a.m) + row : row * a.x_groups + group] = steps.scale;
        const Words4 codes =
            quantize<T>(load_halves<ALIGNED>(x, 16 * p, a.k), load_halves<ALIGNED>(x, 16 * p + 8, a.k), steps.inverse);
        if (a.by_lanes)
            store_by_lanes(a.codes + row * a.padded_k, p, codes);
        else
            *reinterpret_cast<Words4*>(a.codes + row * a.padded_k + 16 * p) = codes;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) sum = dot4(codes.w[i], 0x01010101, sum);
        sums[p] = sum;
    }
    if (!a.sums) return;
    sync_block();
    // Of a row: every thread adds what it can, then the first warp; of a group: a thread for each.
    if (a.sum_groups == 1) {
        int sum = 0;
        for (int p = thread(); p < pieces; p += threads) sum += sums[p];
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (thread() % 32 == 0) of_warp[thread() / 32] = sum;
        sync_block();
        if (thread() == 0) {
            for (int w = 1; w < QUANTIZE_WARPS; w++) sum += of_warp[w];
            a.sums[row] = sum;
        }
        return;
    }
    for (int group = thread(); group < a.sum_groups; group += threads) {
        int sum = 0;
        const int first = group * (a.sum_group / 16);
        for (int i = first; i < first + a.sum_group / 16 && i < pieces; i++) sum += sums[i];
        a.sums[row * a.sum_groups + group] = sum;
    }
}

}  // namespace llmkern::cuda
