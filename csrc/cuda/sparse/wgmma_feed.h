// x and 2:4 weights on their way to shared memory, by a warpgroup that does nothing else. A stage is 128 columns of K:
//
//   x          [2 parts of 64 columns][TOKENS][128 bytes], swizzled (common/matrix_descriptor.h)
//   values     [ROWS][UNITS of 16 bytes], of which unit u stands at u ^ swizzle(row): lanes of eight rows that read the
//              same unit touch all banks
//   positions  [ROWS][16 bytes]
//
// K is a multiple of a stage. What lies beyond the last row of x or w is another row once more.
#pragma once

#include "cuda/common/barrier.h"
#include "cuda/common/matrix_descriptor.h"
#include "cuda/common/wgmma.h"
#include "cuda/sparse/kept.h"

namespace llmkern::cuda {

constexpr int SPARSE_STAGE = 128;  // columns

template <class Format, int ROWS, int TOKENS, int THREADS>
struct SparseFeed {
    static constexpr int UNITS = SPARSE_STAGE / 4 * Format::QUAD_BYTES / 16;
    static constexpr int PART_BYTES = TOKENS * TILE_ROW_BYTES, X_BYTES = 2 * PART_BYTES;
    static constexpr int VALUE_BYTES = ROWS * UNITS * 16, STAGE_BYTES = X_BYTES + VALUE_BYTES + ROWS * 16;
    static constexpr int FIT = (226 * 1024 - 256) / STAGE_BYTES, STAGES = FIT < 8 ? FIT : 8;
    static constexpr int BARRIERS = STAGES * STAGE_BYTES, BYTES = BARRIERS + 2 * STAGES * int(sizeof(Barrier));
    // Stages under way before a thread waits for the first of them. One more is ready by then, one in use.
    static constexpr int AHEAD = STAGES - 2;
    static_assert(STAGES >= 3 && STAGE_BYTES % 1024 == 0, "");

    const SparseArgs& args;
    const int64_t first_row, first_token;
    const int first, last;  // stages

    LLMKERN_DEVICE SparseFeed(const SparseArgs& args, int64_t first_row, int64_t first_token, int split)
        : args(args),
          first_row(first_row),
          first_token(first_token),
          first(int(int64_t(args.k / SPARSE_STAGE) * split / args.splits)),
          last(int(int64_t(args.k / SPARSE_STAGE) * (split + 1) / args.splits)) {}

    static LLMKERN_DEVICE uint8_t* stage_at(int slot) { return shared_memory() + slot * STAGE_BYTES; }
    static LLMKERN_DEVICE int swizzle(int row) { return row / (8 / UNITS) % UNITS; }
    static LLMKERN_DEVICE int value_place(int row, int unit) { return (row * UNITS + (unit ^ swizzle(row))) * 16; }
    // The stage in a slot is there; it has been used.
    static LLMKERN_DEVICE Barrier* full(int slot) {
        return reinterpret_cast<Barrier*>(shared_memory() + BARRIERS) + slot;
    }
    static LLMKERN_DEVICE Barrier* empty(int slot) { return full(STAGES + slot); }

    // By one thread; `users`: warps that say when they have used a stage.
    static LLMKERN_DEVICE void init(int users) {
        for (int slot = 0; slot < STAGES; slot++) {
            barrier_init(full(slot), THREADS / 32);
            barrier_init(empty(slot), users);
        }
    }

    // For a warp, whose lanes come together.
    static LLMKERN_DEVICE void arrive(Barrier* barrier, bool here = true) {
        sync_warp();
        barrier_arrive_if(here && thread() % 32 == 0, barrier);
    }

    struct Slot {  // in turns, with the parity of its phase
        int at = 0;
        uint32_t parity = 0;
        LLMKERN_DEVICE void next() {
            at = at + 1 == STAGES ? 0 : at + 1;
            parity ^= at == 0;
        }
    };

    // UNITS_ units of 16 bytes of each of ALL rows, `row_bytes` apart, of which `rows` exist.
    template <int ALL, int UNITS_>
    struct Copies {
        static constexpr int STEP = THREADS / UNITS_;
        static_assert(ALL % STEP == 0 && STEP % 8 == 0, "a thread's rows are swizzled alike");
        const int row = thread() % THREADS / UNITS_, unit = thread() % UNITS_;
        const uint8_t* from;
        int row_bytes, steps;  // to rows of this thread that exist

        LLMKERN_DEVICE Copies(const void* at, int64_t first, int64_t rows, int row_bytes) : row_bytes(row_bytes) {
            const int exist = int(smaller<int64_t>(rows - first, ALL)), mine = smaller(row, exist - 1);
            from = static_cast<const uint8_t*>(at) + (first + mine) * row_bytes + unit * 16;
            steps = (exist - 1 - mine) / STEP;
        }
        // To rows PITCH apart. Few registers: sums of a step, not every row's place.
        template <int PITCH>
        LLMKERN_DEVICE void copy(uint8_t* to, int byte) const {
            const int exist = settle(steps), step = STEP * row_bytes;
            const uint8_t* at = from + byte;
#pragma unroll
            for (int i = 0; i < ALL / STEP; i++) {
                copy_async_if(true, to + i * STEP * PITCH, at);
                at += i < exist ? step : 0;
            }
        }
    };

    LLMKERN_DEVICE void run() const {
        Copies<TOKENS, 8> x(args.x, first_token, args.out.m, args.k * 2);
        Copies<ROWS, UNITS> values(args.values, first_row, args.out.n, args.row_bytes);
        Copies<ROWS, 1> positions(args.positions, first_row, args.out.n, args.k / 8);
        x.from += int64_t(first) * SPARSE_STAGE * 2;
        values.from += int64_t(first) * UNITS * 16;
        positions.from += int64_t(first) * 16;
        const int x_place = swizzled(x.row, x.unit), values_place = X_BYTES + value_place(values.row, values.unit);
        const int positions_place = X_BYTES + VALUE_BYTES + positions.row * 16;
        Slot fill, ready;
        for (int stage = first; stage < last + AHEAD; stage++) {
            if (stage < last) {
                barrier_wait(empty(fill.at), fill.parity ^ 1);
                uint8_t* const to = stage_at(fill.at);
#pragma unroll
                for (int part = 0; part < 2; part++)
                    x.template copy<TILE_ROW_BYTES>(to + part * PART_BYTES + x_place, part * TILE_ROW_BYTES);
                values.template copy<UNITS * 16>(to + values_place, 0);
                positions.template copy<16>(to + positions_place, 0);
                x.from += SPARSE_STAGE * 2;
                values.from += UNITS * 16;
                positions.from += 16;
                fill.next();
            }
            copy_async_commit();
            copy_async_wait<AHEAD>();
            if (stage - AHEAD < first) continue;
            fence_async();
            arrive(full(ready.at));
            ready.next();
        }
    }
};

}  // namespace llmkern::cuda
