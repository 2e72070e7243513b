// What the kernels share that multiply int8 x with int8 or int4 codes: y = sum over groups of
// (dot product of integers - offset * sum of x's codes) * scale of w * scale of x.
#pragma once

#include "cuda/common/divisor.h"
#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/launch.h"
#include "cuda/linear/quantize.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

// Which columns a product takes together is free, as long as both factors do alike. Four lanes share a row and each has
// 16 bytes of w, LANE_COLUMNS; a product takes two registers of every lane.
struct Int8Codes {
    static constexpr int LANE_COLUMNS = 16;
    static constexpr int PRODUCTS = 2;  // of a lane's 16 bytes
    static constexpr int OFFSET = 0;
    static constexpr int X_SWIZZLE = 4;  // see integer_tile.h
    static LLMKERN_DEVICE void left(const Words4& w, int product, uint32_t& a, uint32_t& b) {
        a = w.w[2 * product], b = w.w[2 * product + 1];
    }
    static LLMKERN_DEVICE void right(const Words4 (&x)[1], int product, uint32_t& a, uint32_t& b) {
        a = x[0].w[2 * product], b = x[0].w[2 * product + 1];
    }
};
// A word's nibbles are two registers of bytes: its even columns, its odd ones. Their offset of 8 is a zero point.
struct Int4Codes {
    static constexpr int LANE_COLUMNS = 32;
    static constexpr int PRODUCTS = 4;
    static constexpr int OFFSET = 8;
    static constexpr int X_SWIZZLE = 1;
    static LLMKERN_DEVICE void left(const Words4& w, int product, uint32_t& a, uint32_t& b) {
        a = w.w[product] & 0x0f0f0f0f, b = w.w[product] >> 4 & 0x0f0f0f0f;
    }
    static LLMKERN_DEVICE void right(const Words4 (&x)[2], int product, uint32_t& a, uint32_t& b) {
        const uint32_t* const from = x[product / 2].w + product % 2 * 2;
        a = permute(from[0], from[1], 0x6420), b = permute(from[0], from[1], 0x7531);
    }
};

struct IntegerArgs {
    const void* x;          // [m, k] as given
    const int8_t* x_codes;  // [m, padded_k], or null: x is quantized where it is used
    const float* x_scales;  // [m, x_groups]
    const int* x_sums;      // [m, groups], where w has offsets
    int x_groups, padded_k;
    const uint8_t* codes;
    int row_bytes;
    const void* scales;
    DType scales_dtype;
    const int8_t* zeros;
    int groups;
    Divisor group_size;
    int k, splits;
    DType y_dtype;
    Output out;
};

LLMKERN_DEVICE float bias_at(const Output& out, int64_t row) {
    return out.bias ? load_float(out.bias, row, out.bias_dtype) : 0.0f;
}

// An element of y.
LLMKERN_DEVICE uint16_t finish(DType dtype, float sum, float scale, float bias) {
    sum = sum * scale + bias;
    return dtype == DType::BF16 ? to_bits<Bf16>(sum) : to_bits<F16>(sum);
}

// Quantizes x into the workspace if there is one, and says where everything is. `x_group`: columns of x that share a
// scale. `by_lanes`: see quantize.h.
template <class Format>
IntegerArgs integer_args(const char* name, const IntegerCodesArgs& args, int row_bytes, int64_t x_group,
                         const Plan& plan, bool by_lanes = false) {
    const CodesArgs& c = args.codes;
    const LinearArgs& l = c.linear;
    const int groups = groups_of(l.k, c.group_size), x_groups = groups_of(l.k, x_group);
    check_group_multiple(name, groups, c.group_size, 4 * Format::LANE_COLUMNS);
    const int padded_k = int((l.k + X_PAD - 1) / X_PAD * X_PAD);
    IntegerArgs to{};
    to.x = l.x;
    to.x_groups = x_groups, to.padded_k = padded_k;
    to.codes = static_cast<const uint8_t*>(c.codes), to.row_bytes = row_bytes;
    to.scales = c.scales, to.scales_dtype = c.scales_dtype, to.zeros = c.zeros;
    to.groups = groups, to.group_size = Divisor::of(uint32_t(c.group_size));
    to.k = int(l.k), to.splits = plan.splits;
    to.y_dtype = l.x_dtype;
    to.out = {l.bias, l.bias_dtype, l.y, l.m, l.n};
    if (!args.workspace) return to;

    // Codes first, then scales, then sums: ops/_cuda.py `integer_workspace`.
    auto* const codes = static_cast<int8_t*>(args.workspace);
    auto* const scales = reinterpret_cast<float*>(codes + l.m * padded_k);
    auto* const sums = reinterpret_cast<int*>(scales + l.m * x_groups);
    to.x_codes = codes, to.x_scales = scales, to.x_sums = sums;
    const bool summed = !by_lanes && (Format::OFFSET || c.zeros);
    const QuantizeArgs quantize{l.x,
                                int(l.m),
                                to.k,
                                padded_k,
                                x_groups,
                                int(x_group),
                                groups,
                                int(c.group_size),
                                codes,
                                scales,
                                summed ? sums : nullptr,
                                by_lanes};
    Grid grid;
    grid.x = unsigned(l.m);
    grid.threads = QUANTIZE_WARPS * 32;
    grid.shared_bytes = (QUANTIZE_WARPS + size_t(padded_k) / 16 * 2) * sizeof(int);
    const bool aligned = l.k % 8 == 0 && aligned_to(l.x, 16);
    by_type(name, l.x_dtype, [&](auto type) {
        using T = decltype(type);
        launch(name, aligned ? quantize_kernel<T, true> : quantize_kernel<T, false>, grid, l.stream, quantize);
    });
    return to;
}

}  // namespace llmkern::cuda
