// Many rows of x with wgmma (sm_90a). Two or four warpgroups multiply 64 rows of w each, decoded to registers, with
// TOKENS rows of x in shared memory; the warps of another one fill stages of K for them (wgmma_fill.h). While the
// tensor cores do one step (16 columns of K), a warp decodes the next one: a chain of about 150 clocks, behind which
// its own product hides with 256 rows of x, and those of three other warps of its scheduler with fewer.
//
// Lane c of four needs the columns 2c, 2c + 1 of each unit of 8, so all four read the same codes, and each takes its
// own byte (int4) or two (int8). What bounds a stage of 64 columns (int4), in clocks of a multiprocessor, whose shared
// memory moves 128 bytes in one and whose four schedulers issue an instruction each:
//
//   rows of w, of x                  128, 256   256, 128   256, 64   256, 32
//   tensor cores, 2048 products          1024       1024       512       256
//   the warps of a scheduler               330        640       630       630   160 instructions each, 145 with scales
//                                                                               per row
//   shared memory: x to wgmma              512        512       256       128   each warpgroup reads all of it
//                  codes and scales         80        160       160       160
//                  what comes              290        210       145       110
//   24 bytes in a clock from L2            850       1024       683       512   what all multiprocessors get at once
//
// With 256 rows of x two blocks share them (wgmma_ring.h), without which L2 would take 1500 clocks.
#pragma once

#include "cuda/linear/wgmma_fill.h"
#include "cuda/linear/wgmma_store.h"

namespace llmkern::cuda {

enum class Scaling { ROW, STAGE, UNIT };  // a scale for: a row, in the end; 64 columns of it; 16 bytes of its codes

template <class Format, class T, int WARPGROUPS, int TOKENS>
struct WgmmaTile {
    using Ring = WgmmaRing<Format, T, WARPGROUPS, TOKENS>;
    static constexpr int STEPS = TILE_COLUMNS / 16;
    static constexpr bool INT4 = Format::LANE_COLUMNS == 32;
    static constexpr int UNIT_STEPS = INT4 ? 2 : 1;  // of 16 bytes of codes
    using Whole = WgmmaStore<T, Ring, Ring::STORE_TILES, false>;
    using Divided = WgmmaStore<T, Ring, TOKENS / 8, true>;  // all at once, where stages were
    static constexpr bool DIVIDED = Ring::BLOCKS == 1;
    static_assert(Whole::BYTES <= Ring::STORE_BYTES, "");
    static_assert(!DIVIDED || Divided::BYTES <= Ring::STAGES * Ring::STAGE_BYTES, "");
    using Left = uint32_t[4];

    const WgmmaArgs& all;
    const TileArgs& args = all.tile;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int first_row = thread() / 32 * 16;  // of a warp's, in the block
    const uint32_t selector = Format::neighbour_selector(c % Format::PAIRS);
    uint32_t codes_at[Ring::UNITS];  // of this lane's row, in a stage
    float acc[TOKENS / 8][4];
    uint32_t words[2][2];  // of a step
    TileScale scales[2];

    explicit LLMKERN_DEVICE WgmmaTile(const WgmmaArgs& args) : all(args) {
#pragma unroll
        for (int unit = 0; unit < Ring::UNITS; unit++)
            codes_at[unit] = settle(uint32_t(Ring::code_unit(first_row + g, unit) + (INT4 ? 0 : c / 2 * 4)));
    }

    LLMKERN_DEVICE void fetch_scales(int at, int slot) {
        const TileScale* const from = Ring::scales(at) + slot * Ring::ROWS + first_row + g;
#pragma unroll
        for (int h = 0; h < 2; h++) scales[h] = from[8 * h];
    }

    // From shared memory, what the decoding of a step needs.
    template <Scaling SCALING>
    LLMKERN_DEVICE void fetch(int at, int step) {
        if (SCALING == Scaling::STAGE ? step == 0 : SCALING == Scaling::UNIT && step % UNIT_STEPS == 0)
            fetch_scales(at, step / UNIT_STEPS);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint8_t* const from = Ring::codes(at) + codes_at[step / UNIT_STEPS] + h * 8 * Ring::PITCH;
            if (INT4) {
                const Words2 both = reinterpret_cast<const Words2*>(from)[step % 2];
                words[h][0] = both.w[0], words[h][1] = both.w[1];
            } else {
                const uint32_t* const mine = reinterpret_cast<const uint32_t*>(from);
                words[h][0] = mine[0], words[h][1] = mine[2];
            }
        }
    }

    template <Scaling SCALING>
    LLMKERN_DEVICE void decode(Left& left) const {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t pair = Format::template neighbours<T, true>(words[h][i], selector, scales[h].offset);
                left[2 * i + h] = SCALING == Scaling::ROW ? pair : fma2<T>(pair, scales[h].scale, MINUS_ZERO);
            }
    }

    LLMKERN_DEVICE void wait_full(const typename Ring::Cursor& stage) const {
        stage.wait_full();
        if (!all.engine) fence_async();
    }

    template <Scaling SCALING>
    LLMKERN_DEVICE void multiply(const WgmmaPart& part, typename Ring::Cursor& next) {
        Left left[2];  // of the step under way, of the next one
        int at = next.at;
        wait_full(next);
        if (SCALING == Scaling::ROW) fetch_scales(at, 0);
        fetch<SCALING>(at, 0);
        decode<SCALING>(left[0]);
        for (int stage = part.first; stage < part.last; stage++) {
            const uint64_t x = describe(Ring::x(next.at), 0);
            const int before = at;
            at = next.at;
            next.next();
            const bool more = stage + 1 < part.last;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                if (step + 1 < STEPS) {
                    fetch<SCALING>(at, step + 1);
                } else if (more) {
                    wait_full(next);
                    fetch<SCALING>(next.at, 0);
                }
                wgmma_fence();
                wgmma<T, TOKENS>(acc, left[step % 2], x + step * (32 / 16));
                wgmma_commit();
                wgmma_wait<1>();  // the step before, whose registers are free now
                if (step == 0) Ring::release(before, stage > part.first);
                if (step + 1 < STEPS || more) decode<SCALING>(left[(step + 1) % 2]);
            }
        }
        wgmma_wait<0>();
        Ring::release(at, true);
    }

    // Factor and bias of a row, for the store: in shared memory, as registers are short.
    LLMKERN_DEVICE void keep_of_rows(int row) const {
        Whole::sync_users();  // those of the tile before have been read
        if (thread() >= Ring::ROWS) return;
        row = smaller(row, int(args.out.n) - 1);
        Ring::factors()[thread()] = row_factor<T>(args, row);
        Ring::biases()[thread()] = args.out.bias ? load_float(args.out.bias, row, args.out.bias_dtype) : 0;
    }

    LLMKERN_DEVICE void run(int split) {
        typename Ring::Cursor next;
        for (int tile = block_x() / Ring::BLOCKS; tile < all.row_blocks * all.token_blocks; tile += all.blocks) {
            const auto part = WgmmaPart::of<Ring>(all, tile, split);
#pragma unroll
            for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[t][i] = 0;
            keep_of_rows(part.first_row + thread());
            if (part.first < part.last) {
                if (args.groups <= 1)
                    multiply<Scaling::ROW>(part, next);
                else if (Ring::one_scale(args))
                    multiply<Scaling::STAGE>(part, next);
                else
                    multiply<Scaling::UNIT>(part, next);
            }
            if constexpr (DIVIDED)
                if (args.splits > 1)  // the only tile: the stages have been used
                    return Divided::run(acc, reinterpret_cast<float*>(Ring::x(0)), args, part, split, first_row);
            Whole::run(acc, Ring::store_place(), args, part, 0, first_row);
        }
        if (Ring::BLOCKS > 1) sync_cluster();  // nobody leaves while the other says there that it has used a stage
    }
};

template <class Format, class T, int WARPGROUPS, int TOKENS>
__global__ void __launch_bounds__(WARPGROUPS * 128 + 128, 1)
    wgmma_kernel(WgmmaArgs args, LLMKERN_GRID_CONSTANT TensorMap x, LLMKERN_GRID_CONSTANT TensorMap codes) {
#if LLMKERN_HAS_WGMMA
    using Tile = WgmmaTile<Format, T, WARPGROUPS, TOKENS>;
    using Ring = typename Tile::Ring;
    using Copy = WgmmaCopy<Ring>;
    using Scales = WgmmaScales<Ring, Format, T>;
    Ring::init((args.engine ? 1 : Copy::THREADS) + Scales::THREADS / 32);
    if (thread() < Ring::USERS) {
        more_registers<(WARPGROUPS < 4 ? 224 : TOKENS < 128 ? 104 : 112)>();
        dependency_wait();
        Tile(args).run(block_y());
    } else {
        fewer_registers<(WARPGROUPS < 4 ? 56 : TOKENS < 128 ? 64 : 32)>();
        if (args.engine && thread() == Ring::USERS) prefetch_by_engine<Ring>(args, x, codes, block_y());
        dependency_wait();
        if (thread() / 64 % 2)
            Scales(args.tile).run(args, block_y());
        else if (!args.engine)
            Copy(args.tile).run(args, block_y());
        else if (thread() == Ring::USERS)
            fill_by_engine<Ring>(args, x, codes, block_y());
    }
#endif
}

}  // namespace llmkern::cuda
