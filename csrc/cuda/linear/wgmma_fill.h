// The warps of wgmma_kernel that fill stages: two bring x and codes in the background and wait for nothing but room (a
// single thread where the copy engine can), two bring scales, which become pairs of T on the way and so pass through
// registers.
//
// Rows of x or w that do not exist are left as they are, or zeros: they meet in no sum that is stored.
// Beyond K there are zeros. fp16 would lose a small scale's bits: see tile_feed.h.
#pragma once

#include "cuda/common/wgmma.h"
#include "cuda/linear/wgmma_ring.h"

namespace llmkern::cuda {

// By one thread, before what earlier kernels write is there: codes of the first stages, on their way to L2.
template <class Ring>
LLMKERN_DEVICE void prefetch_by_engine(const WgmmaArgs& all, const TensorMap& x, const TensorMap& codes, int split) {
    prefetch_map(x);
    const auto part = WgmmaPart::of<Ring>(all, block_x() / Ring::BLOCKS, split);
#pragma unroll 1
    for (int stage = part.first; stage < smaller(part.first + Ring::STAGES, part.last); stage++)
        prefetch_tile(codes, stage * Ring::PITCH, part.first_row);
}

// By one thread.
template <class Ring>
LLMKERN_DEVICE void fill_by_engine(const WgmmaArgs& all, const TensorMap& x, const TensorMap& codes, int split) {
    typename Ring::Cursor next;
    const int x_row = block_x() % Ring::BLOCKS * Ring::X_ROWS;
    for (int tile = block_x() / Ring::BLOCKS; tile < all.row_blocks * all.token_blocks; tile += all.blocks) {
        const auto part = WgmmaPart::of<Ring>(all, tile, split);
#pragma unroll 1
        for (int stage = part.first; stage < part.last; stage++) {
            next.wait_empty();
            Barrier* const full = Ring::full(next.at);
            uint8_t* const to = Ring::x(next.at) + x_row * TILE_ROW_BYTES;
            barrier_expect(full, Ring::STAGE_BYTES);
            copy_tile(Ring::codes(next.at), codes, stage * Ring::PITCH, part.first_row, full);
            if (Ring::BLOCKS > 1)
                copy_tile_to(3, to, x, stage * TILE_ROW_BYTES, part.first_token + x_row, full);
            else
                copy_tile(to, x, stage * TILE_ROW_BYTES, part.first_token, full);
            next.next();
        }
    }
}

template <class Ring>
struct WgmmaCopy {
    static constexpr int THREADS = 64;
    static constexpr int X_STEP = THREADS / 8, CODE_STEP = THREADS / Ring::UNITS;  // rows at a time
    static_assert(X_STEP % 8 == 0 && CODE_STEP % 8 == 0, "all rows of a thread have the same swizzle");

    const TileArgs& args;
    const int t = thread() % THREADS, x_row = t / 8, x_unit = t % 8;
    const int code_row = t / Ring::UNITS, code_unit = t % Ring::UNITS;
    const uint32_t x_to = swizzled(x_row, x_unit), codes_to = Ring::code_unit(code_row, code_unit);
    const uint8_t* x_from;      // of the next stage
    const uint8_t* codes_from;  // likewise
    int x_steps, code_steps;    // rows of this thread that exist

    explicit LLMKERN_DEVICE WgmmaCopy(const TileArgs& args) : args(args) {}

    LLMKERN_DEVICE void begin(const WgmmaPart& part) {
        const int rows = smaller(int(args.out.n) - part.first_row, Ring::ROWS);
        const int64_t column = int64_t(part.first) * TILE_COLUMNS + x_unit * 8;
        x_from = static_cast<const uint8_t*>(args.x) + 2 * (int64_t(part.first_token + x_row) * args.k + column);
        codes_from = args.codes + int64_t(part.first_row + code_row) * args.row_bytes + part.first * Ring::PITCH +
                     code_unit * 16;
        x_steps = (part.tokens - x_row + X_STEP - 1) / X_STEP;
        code_steps = (rows - code_row + CODE_STEP - 1) / CODE_STEP;
    }

    // ALIGNED: rows start at multiples of 16 bytes, so that a unit is whole or is not there. Mostly all rows exist, and
    // nothing is asked row by row.
    template <bool ALIGNED, class Piece, int STEPS, int TO_STEP>
    static LLMKERN_DEVICE void copy(uint8_t* to, const uint8_t* from, int64_t from_step, int steps, int bytes) {
        if (ALIGNED && steps >= STEPS) {
#pragma unroll
            for (int i = 0; i < STEPS; i++, from = settle(from + from_step))
                copy_async_if(bytes > 0, to + i * TO_STEP, from);
            return;
        }
#pragma unroll 1
        for (int i = 0; i < smaller(steps, STEPS); i++, from += from_step)
            if (ALIGNED)
                copy_async_if(bytes > 0, to + i * TO_STEP, from);
            else
                copy_now<Piece>(to + i * TO_STEP, from, bytes);
    }

    LLMKERN_DEVICE void fill(int at, int stage) {
        constexpr int X_STEPS = Ring::TOKENS / X_STEP, CODE_STEPS = Ring::ROWS / CODE_STEP;
        using Piece = typename Ring::Piece;
        const int64_t x_step = int64_t(X_STEP) * 2 * args.k, code_step = int64_t(CODE_STEP) * args.row_bytes;
        const int x_bytes = 2 * smaller(args.k - stage * TILE_COLUMNS - x_unit * 8, 8);
        const int code_bytes = smaller(args.row_bytes - stage * Ring::PITCH - code_unit * 16, 16);
        uint8_t *const x = Ring::x(at) + x_to, *const codes = Ring::codes(at) + codes_to;
        if (args.x_aligned)
            copy<true, uint16_t, X_STEPS, X_STEP * TILE_ROW_BYTES>(x, x_from, x_step, x_steps, x_bytes);
        else
            copy<false, uint16_t, X_STEPS, X_STEP * TILE_ROW_BYTES>(x, x_from, x_step, x_steps, x_bytes);
        if (args.codes_aligned)
            copy<true, Piece, CODE_STEPS, CODE_STEP * Ring::PITCH>(codes, codes_from, code_step, code_steps,
                                                                   code_bytes);
        else
            copy<false, Piece, CODE_STEPS, CODE_STEP * Ring::PITCH>(codes, codes_from, code_step, code_steps,
                                                                    code_bytes);
        x_from += TILE_ROW_BYTES, codes_from += Ring::PITCH;
    }

    LLMKERN_DEVICE void run(const WgmmaArgs& all, int split) {
        typename Ring::Cursor next;
        for (int tile = block_x() / Ring::BLOCKS; tile < all.row_blocks * all.token_blocks; tile += all.blocks) {
            const auto part = WgmmaPart::of<Ring>(all, tile, split);
            begin(part);
            for (int stage = part.first; stage < part.last; stage++) {
                next.wait_empty();
                fill(next.at, stage);
                if (args.x_aligned && args.codes_aligned)
                    copy_async_arrive(Ring::full(next.at));
                else
                    arrive_now(next.at);
                next.next();
            }
        }
        copy_async_commit();
        copy_async_wait<0>();
    }

    // Where some of a stage is copied by way of registers.
    static LLMKERN_DEVICE void arrive_now(int at) {
        copy_async_commit();
        copy_async_wait<0>();
        fence_async();
        barrier_arrive(Ring::full(at));
    }
};

template <class Ring, class Format, class T>
struct WgmmaScales {
    static constexpr int THREADS = 64, HELD = Ring::ROWS / THREADS;

    const TileArgs& args;
    const int t = thread() % THREADS;
    int first[HELD];  // of a row's scales
    float factor[HELD];
    uint32_t bits[HELD];  // of the next group, on their way
    int zero[HELD] = {};

    explicit LLMKERN_DEVICE WgmmaScales(const TileArgs& args) : args(args) {}

    LLMKERN_DEVICE void begin(const WgmmaPart& part) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            first[i] = smaller(part.first_row + t + i * THREADS, int(args.out.n) - 1) * args.groups;
            factor[i] = 1;
            if (std::is_same_v<T, F16> && args.groups > 1)
                factor[i] = 1 / power_of_two<T>(load_float(args.scales, first[i], args.scales_dtype));
        }
    }

    LLMKERN_DEVICE void load(int group) {
        group = smaller(group, args.groups - 1);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (args.groups > 1) bits[i] = load_bits(args.scales, first[i] + group, args.scales_dtype);
            if (args.zeros) zero[i] = args.zeros[first[i] + group];
        }
    }

    LLMKERN_DEVICE void put(TileScale* to) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            // Scales per row wait for the end.
            const float value = args.groups > 1 ? bits_to_float(bits[i], args.scales_dtype) * factor[i] : 1;
            to[i * THREADS] = {pack2<T>(value, value), Format::template neighbour_offset<T>(zero[i])};
        }
    }

    LLMKERN_DEVICE int group_of(int unit) const {
        return args.groups > 1 ? smaller(args.group_units.divide(unit), args.groups - 1) : 0;
    }

    LLMKERN_DEVICE void run(const WgmmaArgs& all, int split) {
        const int slots = Ring::one_scale(args) ? 1 : Ring::SLOTS;
        typename Ring::Cursor cursor;
        for (int tile = block_x() / Ring::BLOCKS; tile < all.row_blocks * all.token_blocks; tile += all.blocks) {
            const auto part = WgmmaPart::of<Ring>(all, tile, split);
            if (part.first == part.last) continue;
            begin(part);
            load(group_of(part.first * Ring::SLOTS));
            int last_group = -1;
            const TileScale* last = nullptr;  // where this thread has put those of that group, which are still there
            for (int stage = part.first; stage < part.last; stage++) {
                cursor.wait_empty();
#pragma unroll 1
                for (int slot = 0; slot < slots; slot++) {
                    const int group = group_of(stage * Ring::SLOTS + slot);
                    TileScale* const to = Ring::scales(cursor.at) + slot * Ring::ROWS + t;
                    if (group != last_group) {
                        put(to);
                        load(group + 1);
                        last_group = group;
                    } else {
#pragma unroll
                        for (int i = 0; i < HELD; i++) to[i * THREADS] = last[i * THREADS];
                    }
                    last = to;
                }
                Ring::arrive(Ring::full(cursor.at));
                cursor.next();
            }
        }
    }
};

}  // namespace llmkern::cuda
