// Few rows of x: warps that stay, and weights that never stop coming.
//
//   a block     keeps its part of x in shared memory; its warps are divided into groups
//   a group     takes tiles of 2 x 16 rows of w in turn; its warps divide K (the block's part of it)
//   a warp      multiplies units of a tile by a chunk of K. DEPTH of them are on their way into slots of its own, from
//               the next tile too: lanes read what they asked for themselves, and no warp waits for another
//   a tile's end   the sums of a group's warps meet in shared memory and are added in a fixed order
//   a cluster   only where a block cannot hold x: its blocks divide K and are one group each
//
// The floor is bytes: 132 multiprocessors that read 4 TB/s have to have 4 TB/s * 1 us / 132 = 30 KB under way each.
// A unit of 2 x 16 x 128 int4 weights, 2 KiB, takes a warp about 250 instructions; 29 MB of them are 7000 clocks of a
// scheduler that issues one per clock, 3.6 us, when 7.5 are needed to read them.
//
// x lies in shared memory as it does in memory but for the order of its pieces of 16 bytes (8 columns):
// [chunk][piece p of a lane][token][lane c of four, at c ^ p], so that reads touch all banks and writes most.
#pragma once

#include "cuda/common/barrier.h"
#include "cuda/common/divisor.h"
#include "cuda/common/instructions.h"
#include "cuda/common/values.h"
#include "cuda/linear/linear.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

struct RingArgs {
    const void* x;
    const uint8_t* codes;
    int row_bytes;
    const void* scales;
    DType scales_dtype;
    const int8_t* zeros;
    int groups;
    Divisor group_size;
    int k;
    int splits;        // blocks of a cluster
    int part;          // of K in chunks, of the block with the most
    int blocks;        // of the grid that take different tiles
    int block_groups;  // of warps; 1 in a cluster
    int tokens;        // rows of x in shared memory
    Divisor pieces;    // of 8 columns, of a row of x in the block with the most
    // Of a warp: scales and zeros of the rows of a tile, how many tiles' (what is asked for is ahead), and how far
    // apart rows are.
    int small_bytes, small_buffers, scale_pitch, zero_pitch;
    bool small_units;  // scales of a row start at multiples of 16 bytes
    Output out;
};

constexpr int RING_TILES = 2;  // of 16 rows, at a time
// Rows of x take registers and shared memory of warps: with more of them, half as many.
template <int TOKEN_TILES>
constexpr int RING_WARPS = TOKEN_TILES == 1 ? 16 : 8;
constexpr int RING_DEPTH = 3;

// Where scales go: to a row's sums at the end, to the sums of a chunk (in fp32), or to the weights (in T).
enum class RingScales { ROWS, SUMS, WEIGHTS };

// Weights: CHUNK columns of 16 rows, SLOT_BYTES of a slot, and how they come and are multiplied (ring_codes.h).
template <class Weights, class T, int TOKEN_TILES>
struct Ring {
    static constexpr int WARPS = RING_WARPS<TOKEN_TILES>, DEPTH = RING_DEPTH, THREADS = WARPS * 32;
    static constexpr int LANE_PIECES = Weights::CHUNK / 32;  // of x, of a lane, in a chunk
    static constexpr int CHUNK_PIECES = 4 * LANE_PIECES;
    static constexpr int VALUES = RING_TILES * TOKEN_TILES * 128;  // sums of a tile
    using Sums = float[RING_TILES][TOKEN_TILES][4];

    const RingArgs& args;
    const int warp = thread() / 32, lane = thread() % 32;
    const int group_warps, group, in_group;
    const int64_t first_token;
    const int split;
    const int first_tile, tile_step, tiles;  // of 32 rows of w
    const int block_chunk, block_chunks;     // of K, of this block
    const int first_chunk, chunks;           // of this warp, from the block's first on
    const int chunk_bytes;                   // of x
    uint8_t* const slots;                    // of this warp
    uint8_t* const small;                    // scales and zeros of this warp
    float* const sums;                       // of this warp's group
    float* const totals;                     // of x: [chunk][8 * TOKEN_TILES tokens]
    const Weights weights;

    LLMKERN_DEVICE Ring(const RingArgs& args, int block, int split, int64_t first_token)
        : args(args),
          group_warps(WARPS / args.block_groups),
          group(warp / group_warps),
          in_group(warp % group_warps),
          first_token(first_token),
          split(split),
          first_tile(group * args.blocks + block),  // all blocks have some before any has more
          tile_step(args.blocks * args.block_groups),
          tiles(int((args.out.n + 16 * RING_TILES - 1) / (16 * RING_TILES))),
          block_chunk(share(all_chunks(args), split, args.splits)),
          block_chunks(share(all_chunks(args), split + 1, args.splits) - block_chunk),
          first_chunk(share(block_chunks, in_group, group_warps)),
          chunks(share(block_chunks, in_group + 1, group_warps) - first_chunk),
          chunk_bytes(LANE_PIECES * 64 * args.tokens),
          slots(shared_memory() + args.part * chunk_bytes + warp * DEPTH * Weights::SLOT_BYTES),
          small(shared_memory() + args.part * chunk_bytes + WARPS * DEPTH * Weights::SLOT_BYTES +
                warp * args.small_buffers * args.small_bytes),
          sums(reinterpret_cast<float*>(shared_memory() + args.part * chunk_bytes +
                                        WARPS * DEPTH * Weights::SLOT_BYTES +
                                        WARPS * args.small_buffers * args.small_bytes) +
               group * group_warps * VALUES),
          totals(sums + (WARPS - group * group_warps) * VALUES),
          weights{args, block_chunk + first_chunk, chunks} {}

    static LLMKERN_DEVICE int all_chunks(const RingArgs& args) { return (args.k + Weights::CHUNK - 1) / Weights::CHUNK; }
    static LLMKERN_DEVICE int share(int all, int i, int parts) { return int(int64_t(all) * i / parts); }

    // Of shared memory.
    static int64_t bytes(const RingArgs& args) {
        return args.part * (LANE_PIECES * 64 * args.tokens + 32 * TOKEN_TILES) +
               WARPS * (DEPTH * Weights::SLOT_BYTES + args.small_buffers * args.small_bytes +
                        VALUES * int(sizeof(float)));
    }

    // Where asking is.
    struct Place {
        int tile, chunk, buffer;  // chunk: of this warp's
        typename Weights::Place rows;
    };
    LLMKERN_DEVICE void ask(Place& place, int slot) const {
        if (place.tile < tiles && chunks) {
            if (place.chunk == 0) {
                weights.go_to(place.rows, place.tile);
                weights.ask_small(small + place.buffer * args.small_bytes, place.rows);
            }
            weights.ask(slots + slot * Weights::SLOT_BYTES, place.rows, place.chunk);
            if (++place.chunk == chunks) {
                place.chunk = 0, place.tile += tile_step;
                if (++place.buffer == args.small_buffers) place.buffer = 0;
            }
        }
        copy_async_commit();
    }

    LLMKERN_DEVICE void copy_x() const {
        const int pieces = block_chunks * CHUNK_PIECES;
        for (int i = thread(); i < int(args.pieces.divisor) * args.tokens; i += THREADS) {
            // Neighbours are a token's.
            const int token = args.pieces.divide(i), piece = i - token * int(args.pieces.divisor);
            if (piece >= pieces) continue;
            const int column = block_chunk * Weights::CHUNK + piece * 8;
            const int of_lane = piece % LANE_PIECES, c = piece / LANE_PIECES % 4;
            copy_async_if(first_token + token < args.out.m && column < args.k,
                          shared_memory() + piece / CHUNK_PIECES * chunk_bytes +
                              (of_lane * args.tokens + token) * 64 + (c ^ (of_lane & 3)) * 16,
                          static_cast<const uint16_t*>(args.x) + (first_token + token) * args.k + column);
        }
    }

    LLMKERN_DEVICE void sync_group() const { sync_threads(1 + group, group_warps * 32); }

    // The sums of a tile, by all warps of the group.
    LLMKERN_DEVICE void finish(const Sums& acc, int tile) const {
        sync_group();  // nobody reads the last tile's any more
        float* const to = sums + in_group * VALUES + lane;
#pragma unroll
        for (int r = 0; r < RING_TILES; r++)
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) to[((r * TOKEN_TILES + t) * 4 + i) * 32] = acc[r][t][i];
        sync_group();
#pragma unroll 1
        for (int at = in_group * 32 + lane; at < VALUES; at += group_warps * 32) {
            float sum = sums[at];
#pragma unroll 4
            for (int w = 1; w < group_warps; w++) sum += sums[w * VALUES + at];
            if (args.splits == 1)
                store(sum, tile, at);
            else
                sums[at] = sum;
        }
        if (args.splits == 1) return;
        sync_cluster();
        const int part = VALUES / args.splits;
#pragma unroll 1
        for (int at = split * part + in_group * 32 + lane; at < (split + 1) * part; at += group_warps * 32) {
            float sum = 0;
            for (int rank = 0; rank < args.splits; rank++) sum += load_cluster(sums + at, rank);
            store(sum, tile, at);
        }
        sync_cluster();
    }

    LLMKERN_DEVICE void store(float sum, int tile, int at) const {
        const int from = at % 32, value = at / 32 % 4, t = at / 128 % TOKEN_TILES, r = at / 128 / TOKEN_TILES;
        const int64_t row = (int64_t(tile) * RING_TILES + r) * 16 + from / 4 + value / 2 * 8;
        const int64_t token = first_token + t * 8 + from % 4 * 2 + value % 2;
        if (row >= args.out.n || token >= args.out.m) return;
        sum = weights.finished(sum, row);
        if (args.out.bias) sum += load_float(args.out.bias, row, args.out.bias_dtype);
        static_cast<uint16_t*>(args.out.y)[token * args.out.n + row] = to_bits<T>(sum);
    }

    LLMKERN_DEVICE void run() const {
        weights.prefetch(first_tile);
        dependency_wait();
        Place next{first_tile, 0, 0, {}};
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) ask(next, i);
        copy_x();
        copy_async_commit();
        copy_async_wait<0>();
        sync_block();
        const uint8_t* const block_x = shared_memory();
        if (Weights::TOTALS) {
#pragma unroll 1
            for (int chunk = warp; chunk < block_chunks; chunk += WARPS)
                weights.add_x(totals + chunk * 8 * TOKEN_TILES, block_x + chunk * chunk_bytes);
            sync_block();
        }
        int slot = 0, buffer = 0;
#pragma unroll 1
        for (int tile = first_tile; tile < tiles; tile += tile_step) {
            Sums acc = {};
            const auto rows = weights.small_of(tile, small + buffer * args.small_bytes);
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk++) {
                copy_async_wait<DEPTH - 1>();
                sync_warp();
                weights.multiply(acc, slots + slot * Weights::SLOT_BYTES, rows, chunk,
                                 block_x + (first_chunk + chunk) * chunk_bytes,
                                 totals + (first_chunk + chunk) * 8 * TOKEN_TILES);
                sync_warp();
                ask(next, slot);
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
            }
            if (++buffer == args.small_buffers) buffer = 0;
            finish(acc, tile);
        }
        copy_async_wait<0>();
    }
};

template <class Weights, class T, int TOKEN_TILES>
__global__ void __launch_bounds__(RING_WARPS<TOKEN_TILES> * 32, 1) ring_kernel(RingArgs args) {
    const Ring<Weights, T, TOKEN_TILES> ring(args, block_x(), block_y(), int64_t(block_z()) * args.tokens);
    ring.run();
}

}  // namespace llmkern::cuda
