// sm_90a, more rows of quantized x: as integer_tile.h, but with products of a warpgroup, which read both factors from
// shared memory. w is the left one, 64 rows to each of two warpgroups, so that few rows of x are not padded to 64. For
// several scales per row of w, and for rows that are not aligned; the rest is integer_copied.h's.
#pragma once

#include "cuda/common/wgmma_s8.h"
#include "cuda/linear/integer_copied.h"

namespace llmkern::cuda {

// Two blocks share a multiprocessor.
constexpr int wgmma_stages(int tokens) { return tokens <= 32 ? 5 : 4; }
constexpr int integer_wgmma_bytes(int tokens) {
    const int stages = wgmma_stages(tokens) * (TILE_ROWS + tokens) * TILE_STEP, sums = tokens * TILE_STRIDE * 4;
    return stages > sums ? stages : sums;
}

// GROUPED: w has several scales per row, each of whole steps. ALIGNED: rows of w start at multiples of 16 bytes.
template <int TOKENS_, bool GROUPED, bool ALIGNED>
struct IntegerWgmma {
    static constexpr int TOKENS = TOKENS_, THREADS = 256, W_BYTES = TILE_STEP, STAGES = wgmma_stages(TOKENS);
    static constexpr int W_STAGE = TILE_ROWS * TILE_STEP, STAGE = W_STAGE + TOKENS * TILE_STEP;
    static constexpr int TILES = TOKENS / 8;

    const IntegerArgs& args;
    const int64_t first_row, first_token;
    const int warpgroup = thread() / 128, c = thread() % 4;
    const int tile_row = thread() / 32 * 16 + thread() % 32 / 4;  // and 8 more
    int sums[TILES][4] = {};
    float acc[GROUPED ? TILES : 1][4] = {};

    LLMKERN_DEVICE IntegerWgmma(const IntegerArgs& args, int64_t first_row, int64_t first_token)
        : args(args), first_row(first_row), first_token(first_token) {}

    static LLMKERN_DEVICE int w_place(int row, int piece) { return swizzled(row, piece); }
    static LLMKERN_DEVICE int x_place(int token, int piece) { return swizzled(token, piece); }

    LLMKERN_DEVICE void load(int step) const {
        uint8_t* const w = shared_memory() + step % STAGES * STAGE;
        load_step<IntegerWgmma, THREADS, ALIGNED>(args, first_row, first_token, step, w, w + W_STAGE);
    }

    // Of a whole group, or of one of whose steps this block has a part: the block with its first step has its sums of
    // x.
    LLMKERN_DEVICE void scale_sums(int group, bool first_of_group) {
        float scale[2];
        int zero[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int64_t at = smaller<int64_t>(first_row + tile_row + 8 * h, args.out.n - 1) * args.groups + group;
            scale[h] = load_float(args.scales, at, args.scales_dtype);
            zero[h] = args.zeros ? args.zeros[at] : 0;
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t token = smaller<int64_t>(first_token + 8 * t + 2 * c + i % 2, args.out.m - 1);
                const int x_sum = args.zeros && first_of_group ? args.x_sums[token * args.groups + group] : 0;
                acc[t][i] += float(sums[t][i] - zero[i / 2] * x_sum) * scale[i / 2];
                sums[t][i] = 0;
            }
    }

    template <class V>
    LLMKERN_DEVICE void to_shared(const V (&values)[TILES][4]) const {
        V* const to = reinterpret_cast<V*>(shared_memory());
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) to[(8 * t + 2 * c + i % 2) * TILE_STRIDE + tile_row + i / 2 * 8] = values[t][i];
    }

    LLMKERN_DEVICE void run(int split) {
        int first, last;
        steps_of(args, split, first, last);
#pragma unroll
        for (int s = 0; s < STAGES - 2; s++) {
            if (first + s < last) load(first + s);
            copy_async_commit();
        }
        bool first_of_group = false;
        for (int step = first; step < last; step++) {
            copy_async_wait<STAGES - 3>();
            fence_async();
            sync_block();  // also: everyone has waited for the products of the step before the last
            const uint8_t* const w = shared_memory() + step % STAGES * STAGE;
            wgmma_fence();
#pragma unroll
            for (int byte = 0; byte < TILE_STEP; byte += 32)
                wgmma_s8<TOKENS>(sums, describe(w + warpgroup * 64 * TILE_STEP, byte), describe(w + W_STAGE, byte));
            wgmma_commit();
            if (step + STAGES - 2 < last) load(step + STAGES - 2);
            copy_async_commit();
            if constexpr (GROUPED) {
                const int column = step * TILE_STEP, group = args.group_size.divide(column);
                first_of_group |= column == group * int(args.group_size.divisor);
                if (step + 1 == last || (column + TILE_STEP) % int(args.group_size.divisor) == 0) {
                    wgmma_wait<0>();
                    scale_sums(group, first_of_group);
                    first_of_group = false;
                } else {
                    wgmma_wait<1>();
                }
            } else {
                wgmma_wait<1>();
            }
        }
        wgmma_wait<0>();
        copy_async_wait<0>();
        sync_block();
        if constexpr (GROUPED) {
            to_shared(acc);
            store_tile<Int8Codes, float, THREADS, TOKENS>(args, first_row, first_token, split);
        } else {
            to_shared(sums);
            store_tile<Int8Codes, int, THREADS, TOKENS>(args, first_row, first_token, split);
        }
    }
};

template <int TOKENS, bool GROUPED, bool ALIGNED>
__global__ void __launch_bounds__(256) integer_wgmma_kernel(IntegerArgs args) {
#if LLMKERN_HAS_WGMMA
    int64_t first_row, first_token;
    tile_of<TILE_ROWS, TOKENS>(args.out, block_x(), first_row, first_token);
    IntegerWgmma<TOKENS, GROUPED, ALIGNED> tile(args, first_row, first_token);
    tile.run(block_y());
#endif
}

template <int ROW_TILES, int TOKENS, bool PAIRED>
void launch_integer_copied_instance(const char* name, const IntegerArgs& args, void* stream) {
    using Tile = IntegerCopied<ROW_TILES, TOKENS, PAIRED>;
    launch_copied<Tile>(name, integer_copied_kernel<Tile>, args, stream, TILE_STEP);
}

// plan.row_tiles of 16 and 8 are the sizes above. Rows of w start at multiples of 16 bytes.
inline void launch_integer_copied(const char* name, const IntegerArgs& args, void* stream, const Plan& plan) {
    if (plan.splits > (args.k + TILE_STEP - 1) / TILE_STEP) no_instance(name, plan);
    if (plan.row_tiles == 16 && plan.token_tiles == 4)
        return launch_integer_copied_instance<2, 32, false>(name, args, stream);
    if (plan.row_tiles == 16 && plan.token_tiles == 8)
        return launch_integer_copied_instance<2, 64, false>(name, args, stream);
    if (plan.row_tiles == 16 && plan.token_tiles == 12)
        return launch_integer_copied_instance<2, 96, false>(name, args, stream);
    if (plan.row_tiles == 16 && plan.token_tiles == 16)
        return launch_integer_copied_instance<2, 128, false>(name, args, stream);
    if (plan.row_tiles == 8 && plan.token_tiles == 32 && plan.splits == 1)
        return launch_integer_copied_instance<1, 256, true>(name, args, stream);
    no_instance(name, plan);
}

inline void launch_integer_wgmma(const char* name, const IntegerCodesArgs& from, const Plan& plan) {
    const int64_t k = from.codes.linear.k;
    const IntegerArgs args = integer_args<Int8Codes>(name, from, int(k), k, plan);
    const bool aligned = k % 16 == 0 && aligned_to(args.codes, 16), grouped = args.groups > 1;
    if (!args.x_codes) throw std::runtime_error(std::string(name) + ": needs room for quantized x");
    check_group_multiple(name, args.groups, from.codes.group_size, TILE_STEP);
    if (aligned && !grouped) return launch_integer_copied(name, args, from.codes.linear.stream, plan);
    const auto start = [&](auto kernel, int tokens) {
        Grid grid;
        grid.x = unsigned((args.out.n + TILE_ROWS - 1) / TILE_ROWS * ((args.out.m + tokens - 1) / tokens));
        grid.y = grid.cluster_y = unsigned(plan.splits);
        grid.threads = 256;
        grid.shared_bytes = size_t(integer_wgmma_bytes(tokens));
        launch(name, kernel, grid, from.codes.linear.stream, args);
    };
    if (!aligned)
        return grouped ? start(integer_wgmma_kernel<64, true, false>, 64)
                       : start(integer_wgmma_kernel<64, false, false>, 64);
    if (plan.token_tiles == 4) return start(integer_wgmma_kernel<32, true, true>, 32);
    if (plan.token_tiles == 8) return start(integer_wgmma_kernel<64, true, true>, 64);
    if (plan.token_tiles == 12) return start(integer_wgmma_kernel<96, true, true>, 96);
    no_instance(name, plan);
}

}  // namespace llmkern::cuda
