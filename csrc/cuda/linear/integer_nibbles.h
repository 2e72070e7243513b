// sm_90a, int4 weights and x quantized per group: tiles come as integer_copied.h's do; nibbles become bytes in
// registers, the left factor. A lane takes 16 bytes of a row, of which word p is its share of product p: even columns,
// then odd ones. x is quantized into the order that follows (quantize.h, by_lanes).
//
// A nibble in the upper half of a byte, less 8, is sixteen times the weight. Sums begin with the bits of a float whose
// fraction counts ones, so that they are floats when they are done: 256 columns at most, then they are scaled and added
// to those of the row. That takes as many instructions as two warpgroups have time for: while one scales, the other
// multiplies.
#pragma once

#include "cuda/linear/integer_copied.h"

namespace llmkern::cuda {

constexpr int NIBBLE_STEP = TILE_STEP / 2;  // bytes of a row of w in a step

template <int TOKENS_, bool PAIRED>
struct IntegerNibbles : IntegerCopied<1, TOKENS_, PAIRED, NIBBLE_STEP> {
    using Copied = IntegerCopied<1, TOKENS_, PAIRED, NIBBLE_STEP>;
    using Copied::args, Copied::first, Copied::first_row, Copied::first_token, Copied::last;
    static constexpr int TOKENS = TOKENS_, PRODUCTS = TILE_STEP / 32, MOST_STEPS = 2;
    static constexpr int X_SCALES = Copied::ALL, BYTES = X_SCALES + 4 * TOKENS * int(sizeof(float));
    static constexpr int SHARED = BYTES > Copied::SUMS ? BYTES : Copied::SUMS;
    static constexpr int MAGIC = 0x4b400000;  // 1.5 * 2^23: sums are below 256 * 127 * 128 = 2^22

    LLMKERN_DEVICE IntegerNibbles(const IntegerArgs& args, int64_t first_row, int64_t first_token, int split)
        : Copied(args, first_row, first_token, split) {}

    // The steps after which sums are scaled, in turns.
    struct Groups {
        const int length;  // in steps
        int group, left;   // of the group
        int run = 0;       // steps in the sums
        LLMKERN_DEVICE Groups(const IntegerArgs& args, int first)
            : length(args.groups > 1 ? int(args.group_size.divisor) / TILE_STEP : 1 << 30),
              group(args.groups > 1 ? args.group_size.divide(first * TILE_STEP) : 0),
              left(length - (args.groups > 1 ? first - group * length : 0)) {}
        LLMKERN_DEVICE void next() {
            run = over() ? 0 : run + 1;
            if (--left == 0) group++, left = length;
        }
        // After this step.
        LLMKERN_DEVICE bool over() const { return left == 1 || run == MOST_STEPS - 1; }
    };

    struct Bits {  // of the scales of this thread's two rows, and of one row of x
        uint32_t w[2];
        float x;
    };
    LLMKERN_DEVICE Bits load_scales(int row, int group) const {
        Bits bits;
        group = smaller(group, args.groups - 1);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int64_t at = smaller<int64_t>(first_row + row + 8 * h, args.out.n - 1);
            bits.w[h] = load_bits(args.scales, at * args.groups + group, args.scales_dtype);
        }
        const int64_t token = smaller<int64_t>(first_token + thread() % TOKENS, args.out.m - 1);
        // Of a row of x with one scale `store_tile` takes care.
        bits.x = args.x_groups > 1 ? args.x_scales[group * args.out.m + token] : 1.0f;
        return bits;
    }

    static LLMKERN_DEVICE void decode(uint32_t (&left)[PRODUCTS][4], const uint8_t* w, int row, int c) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = row + 8 * h;
            const Words4 words = *reinterpret_cast<const Words4*>(w + at * NIBBLE_STEP + (c ^ (at / 2 & 3)) * 16);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++) {
                left[p][h] = (words.w[p] << 4 & 0xf0f0f0f0) ^ 0x80808080;
                left[p][2 + h] = (words.w[p] & 0xf0f0f0f0) ^ 0x80808080;
            }
        }
    }

    // Sums to shared memory. A step at least, see integer_copied.h.
    LLMKERN_DEVICE void multiply() const {
        const int warpgroup = thread() / 128, g = thread() % 32 / 4, c = thread() % 4;
        const int row = warpgroup * 64 + thread() / 32 % 4 * 16 + g;
        float* const x_scales = reinterpret_cast<float*>(shared_memory() + X_SCALES) + warpgroup * 2 * TOKENS;
        int sums[TOKENS / 8][4];
        float acc[TOKENS / 8][4] = {};
#pragma unroll
        for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[t][i] = MAGIC;
        int step = first, slot = 0, turn = 0;
        uint32_t parity = 0;
        dependency_wait();
        Groups groups(args, first);
        Bits bits = load_scales(row, groups.group);
#pragma unroll 1
        do {
            barrier_wait(Copied::full(slot), parity);
            const uint8_t* const at = Copied::stage_at(slot);
            uint32_t left[PRODUCTS][4];
            decode(left, at, row, c);
            wgmma_fence();
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++) wgmma_s8<TOKENS>(sums, left[p], describe(at + Copied::W_BYTES, p * 32));
            wgmma_commit();
            // Behind the products: the scales of this group to where all see them, those of the next one from memory.
            const bool over = groups.over() || step + 1 == last;
            float scale[2];
            float* const shared_scales = x_scales + turn * TOKENS;
            if (over) {
#pragma unroll
                for (int h = 0; h < 2; h++) scale[h] = bits_to_float(bits.w[h], args.scales_dtype) * 0.0625f;
                if (thread() % 128 < TOKENS) shared_scales[thread() % 128] = bits.x;
                bits = load_scales(row, groups.left == 1 ? groups.group + 1 : groups.group);
                warpgroup ? sync_threads<2, 128>() : sync_threads<3, 128>();
                turn ^= 1;
            }
            wgmma_wait<0>();
            Copied::release(slot, true);
            if (over) {
#pragma unroll
                for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float x_scale = shared_scales[8 * t + 2 * c + i];
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            int& sum = sums[t][2 * h + i];
                            acc[t][2 * h + i] += (as_float(uint32_t(sum)) - as_float(MAGIC)) * (x_scale * scale[h]);
                            sum = MAGIC;
                        }
                    }
            }
            groups.next();
            slot = slot + 1 == Copied::STAGES ? 0 : slot + 1;
            parity ^= slot == 0;
        } while (++step < last);
        sync_threads<1, Copied::CONSUMERS>();  // all products are done with what stands where sums go
        float* const to = reinterpret_cast<float*>(shared_memory());
#pragma unroll
        for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) to[(8 * t + 2 * c + i % 2) * Copied::STRIDE + row + i / 2 * 8] = acc[t][i];
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    integer_nibbles_kernel(IntegerArgs args, LLMKERN_GRID_CONSTANT TensorMap w, LLMKERN_GRID_CONSTANT TensorMap x) {
    run_copied<Tile, Int4Codes, float>(args, w, x);
}

template <int TOKENS, bool PAIRED>
void launch_integer_nibbles_instance(const char* name, const IntegerArgs& args, void* stream) {
    using Tile = IntegerNibbles<TOKENS, PAIRED>;
    launch_copied<Tile>(name, integer_nibbles_kernel<Tile>, args, stream, NIBBLE_STEP);
}

// K in steps, weights at a multiple of 16 bytes and without zeros: the rest is cuda.mma_int8's.
inline void launch_integer_nibbles(const char* name, const IntegerCodesArgs& from, const Plan& plan) {
    const CodesArgs& codes = from.codes;
    const int64_t k = codes.linear.k;
    if (k % TILE_STEP || !k || !aligned_to(codes.codes, 16) || codes.zeros || !from.workspace)
        throw std::runtime_error(std::string(name) + ": needs whole steps, aligned codes, no zeros, and a workspace");
    if (plan.row_tiles != 8 || plan.splits > k / TILE_STEP) no_instance(name, plan);
    const IntegerArgs args = integer_args<Int4Codes>(name, from, int(k / 2), codes.group_size, plan, true);
    void* const stream = codes.linear.stream;
    if (plan.token_tiles == 8) return launch_integer_nibbles_instance<64, false>(name, args, stream);
    if (plan.token_tiles != 16) no_instance(name, plan);
    if (plan.splits == 1) return launch_integer_nibbles_instance<128, true>(name, args, stream);
    launch_integer_nibbles_instance<128, false>(name, args, stream);
}

}  // namespace llmkern::cuda
