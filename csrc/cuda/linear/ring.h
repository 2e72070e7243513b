// Few rows of x: warps that stay, and weights that never stop coming.
//
//   a block     keeps its part of x in shared memory; its warps are divided into groups
//   a group     takes tiles of w, of 16 or 32 rows, in turn; its warps divide K (the block's part of it)
//   a warp      multiplies units of a tile by a chunk of K. DEPTH of them are on their way into slots of its own, from
//               the next tile too, by the copy engine: no warp waits for another
//   a tile's end   the sums of a group's warps meet in shared memory and are added in a fixed order
//   a cluster   only where a block cannot hold x: its blocks divide K and are one group each
//
// The floor is bytes: 132 multiprocessors that read 4 TB/s have to have 4 TB/s * 1 us / 132 = 30 KB under way each.
// A unit of 2 x 16 x 128 int4 weights, 2 KiB, takes a warp about 250 instructions; 29 MB of them are 7000 clocks of a
// scheduler that issues one per clock, 3.6 us, when 7.5 are needed to read them.
//
// x lies in shared memory as it does in memory, rows so far apart that two of them are in different banks.
#pragma once

#include "cuda/common/divisor.h"
#include "cuda/common/tensor_map.h"
#include "cuda/common/values.h"
#include "cuda/linear/linear.h"
#include "cuda/linear/reduce.h"

namespace llmkern::cuda {

struct RingArgs {
    const void* x;
    const void* scales;
    DType scales_dtype;
    const int8_t* zeros;
    int groups;
    Divisor group_size;
    int k;
    int chunks;       // of K
    int split_shift;  // 1 << it: blocks of a cluster
    int part;         // of K in chunks, of the block with the most
    int blocks;       // of the grid that take different tiles
    int group_shift;  // 1 << it: warps of a group; all of a block in a cluster
    int tokens;       // rows of x in shared memory
    int x_pitch;      // bytes from one to the next
    // Of a warp: scales and zeros of the rows of a tile, how many tiles' (what is asked for is ahead), and how far
    // apart rows are.
    int small_bytes, small_buffers, scale_pitch, zero_pitch;
    bool small_units;  // scales of a row start at multiples of 16 bytes
    Output out;
};

constexpr int RING_WARPS = 16;
// More rows of x leave room for fewer slots.
template <int TOKEN_TILES>
constexpr int RING_DEPTH = TOKEN_TILES == 1 ? 3 : 2;

// Where scales go: to a row's sums at the end, to the sums of a chunk (in fp32), or to the weights (in T).
enum class RingScales { ROWS, SUMS, WEIGHTS };

// Weights: TILES times 16 rows of a tile, CHUNK columns of a unit, SLOT_BYTES and SIDE_BYTES of a slot, and how a unit
// comes and is multiplied (ring_codes.h, sparse/ring_kept.h). The parts of a slot lie apart, since the first ones, of
// the copy engine, have to be at multiples of 1024 bytes, the others at multiples of 128.
template <class Weights, class T, int TOKEN_TILES>
struct Ring {
    static constexpr int WARPS = RING_WARPS, DEPTH = RING_DEPTH<TOKEN_TILES>, THREADS = WARPS * 32;
    static constexpr int ALL_VALUES = Weights::TILES * TOKEN_TILES * 128;  // sums of a tile
    // Of those that meet at a time: with more rows of x there is less room.
    static constexpr int MEET = TOKEN_TILES == 1 ? Weights::TILES : 1, VALUES = MEET * 128;
    using Sums = float[Weights::TILES][TOKEN_TILES][4];

    const RingArgs& args;
    const int warp = thread() / 32, lane = thread() % 32;
    const int group_warps, group, in_group;
    const int64_t first_token;
    const int split, splits;
    const int first_tile, tile_step, tiles;
    const int block_chunk, block_chunks;  // of K, of this block
    const int first_chunk, chunks;        // of this warp, from the block's first on
    uint8_t* const slots;                 // of this warp
    uint8_t* const sides;
    uint8_t* const small;  // scales and zeros of this warp
    float* const sums;     // of this warp's group
    float* const kept;     // in a cluster: sums of every tile
    uint8_t* const x;
    Barrier* const x_there;
    Barrier* const there;  // of this warp, by slot
    const Weights weights;

    LLMKERN_DEVICE Ring(const RingArgs& args, const TensorMap& first, const TensorMap& second, int block, int split,
                        int64_t first_token)
        : args(args),
          group_warps(1 << args.group_shift),
          group(warp >> args.group_shift),
          in_group(warp - (group << args.group_shift)),
          first_token(first_token),
          split(split),
          splits(1 << args.split_shift),
          first_tile(group * args.blocks + block),  // all blocks have some before any has more
          tile_step((WARPS >> args.group_shift) * args.blocks),
          tiles(int((args.out.n + 16 * Weights::TILES - 1) / (16 * Weights::TILES))),
          block_chunk(args.chunks * split >> args.split_shift),
          block_chunks((args.chunks * (split + 1) >> args.split_shift) - block_chunk),
          first_chunk(block_chunks * in_group >> args.group_shift),
          chunks((block_chunks * (in_group + 1) >> args.group_shift) - first_chunk),
          slots(shared_memory() + warp * DEPTH * Weights::SLOT_BYTES),
          sides(shared_memory() + WARPS * DEPTH * Weights::SLOT_BYTES + warp * DEPTH * Weights::SIDE_BYTES),
          small(shared_memory() + SLOTS + warp * args.small_buffers * args.small_bytes),
          sums(reinterpret_cast<float*>(shared_memory() + SLOTS + WARPS * args.small_buffers * args.small_bytes) +
               group * group_warps * VALUES),
          kept(sums + (WARPS - group * group_warps) * VALUES),
          x(reinterpret_cast<uint8_t*>(kept + (args.split_shift ? rounds_of(args) * ALL_VALUES : 0))),
          x_there(reinterpret_cast<Barrier*>(x + args.tokens * args.x_pitch)),
          there(x_there + 1 + warp * DEPTH),
          weights{args, first, second, block_chunk + first_chunk, chunks} {}

    static constexpr int SLOTS = WARPS * DEPTH * (Weights::SLOT_BYTES + Weights::SIDE_BYTES);

    // Tiles of a block in a cluster, which all its warps share.
    static LLMKERN_DEVICE int rounds_of(const RingArgs& args) {
        const int tiles = int((args.out.n + 16 * Weights::TILES - 1) / (16 * Weights::TILES));
        return (tiles + args.blocks - 1) / args.blocks;
    }

    // Of shared memory. rounds: tiles of a block in a cluster; 0 without one.
    static int64_t bytes(const RingArgs& args, int64_t rounds) {
        return SLOTS + WARPS * args.small_buffers * args.small_bytes +
               (WARPS * VALUES + rounds * ALL_VALUES) * int(sizeof(float)) + int64_t(args.tokens) * args.x_pitch +
               (1 + WARPS * DEPTH) * int(sizeof(Barrier));
    }

    // Where asking is.
    struct Place {
        int tile, chunk, buffer;  // chunk: of this warp's
    };
    LLMKERN_DEVICE bool there_is(const Place& place) const { return place.tile < tiles && chunks; }
    LLMKERN_DEVICE void ask_codes(const Place& place, int slot) const {
        weights.ask(slots + slot * Weights::SLOT_BYTES, sides + slot * Weights::SIDE_BYTES, place.tile, place.chunk,
                    there + slot);
    }
    LLMKERN_DEVICE void ask_small(const Place& place) const {
        if (place.chunk == 0) weights.ask_small(small + place.buffer * args.small_bytes, place.tile);
    }
    LLMKERN_DEVICE void move_on(Place& place) const {
        if (++place.chunk < chunks) return;
        place.chunk = 0, place.tile += tile_step;
        if (++place.buffer == args.small_buffers) place.buffer = 0;
    }
    LLMKERN_DEVICE void ask(Place& place, int slot) const {
        if (there_is(place)) {
            ask_codes(place, slot);
            ask_small(place);
            move_on(place);
        }
        copy_async_commit();
    }
    // The first units: their codes before anything else.
    LLMKERN_DEVICE Place ask_first() const {
        Place place{first_tile, 0, 0}, again = place;
#pragma unroll 1
        for (int i = 0; i < DEPTH && there_is(place); i++) ask_codes(place, i), move_on(place);
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) {
            if (there_is(again)) ask_small(again), move_on(again);
            copy_async_commit();
        }
        return place;
    }

    // This block's columns of x; zeros where K ends within a chunk.
    LLMKERN_DEVICE void ask_x() const {
        const int tokens = int(smaller<int64_t>(args.tokens, args.out.m - first_token));
        const int column = block_chunk * Weights::CHUNK;
        const int columns = smaller(block_chunks * Weights::CHUNK, args.k - column);
        if (thread() == 0) barrier_expect(x_there, tokens * columns * 2);
        if (warp == 0) {
            sync_warp();
            if (lane < tokens)
                copy_bytes(x + lane * args.x_pitch,
                           static_cast<const uint16_t*>(args.x) + (first_token + lane) * args.k + column, columns * 2,
                           x_there);
        }
        const int rest = block_chunks * Weights::CHUNK - columns;
        for (int i = thread(); i < rest * tokens; i += THREADS)
            reinterpret_cast<uint16_t*>(x + i / rest * args.x_pitch)[columns + i % rest] = 0;
    }

    LLMKERN_DEVICE void sync_group() const { sync_threads(1 + group, group_warps * 32); }

    // The sums of a tile, by all warps of the group: MEET times 16 rows and 8 tokens at a time.
    LLMKERN_DEVICE void finish(const Sums& acc, int tile, int round) const {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int r = 0; r < Weights::TILES; r += MEET) {
                sync_group();  // nobody reads the last ones any more
                float* const to = sums + in_group * VALUES + lane;
#pragma unroll
                for (int i = 0; i < 4 * MEET; i++) to[i * 32] = acc[r + i / 4][t][i % 4];
                sync_group();
                const int first = (t * Weights::TILES + r) * 128;
#pragma unroll 1
                for (int at = in_group * 32 + lane; at < VALUES; at += group_warps * 32) {
                    float sum = sums[at];
#pragma unroll 4
                    for (int w = 1; w < group_warps; w++) sum += sums[w * VALUES + at];
                    if (splits == 1)
                        store(sum, tile, first + at);
                    else
                        kept[round * ALL_VALUES + first + at] = sum;
                }
            }
    }

    // In a cluster, after all tiles: their sums from all blocks.
    LLMKERN_DEVICE void finish_cluster() const {
        sync_cluster();
        int round = 0;
        for (int tile = first_tile; tile < tiles; tile += tile_step, round++) {
            const int part = ALL_VALUES >> args.split_shift;
            for (int at = split * part + thread(); at < (split + 1) * part; at += THREADS) {
                float sum = 0;
#pragma unroll 1
                for (int rank = 0; rank < splits; rank++) sum += load_cluster(kept + round * ALL_VALUES + at, rank);
                store(sum, tile, at);
            }
        }
        sync_cluster();  // nobody leaves while another reads its memory
    }

    LLMKERN_DEVICE void store(float sum, int tile, int at) const {
        const int from = at % 32, value = at / 32 % 4, r = at / 128 % Weights::TILES, t = at / 128 / Weights::TILES;
        const int64_t row = (int64_t(tile) * Weights::TILES + r) * 16 + from / 4 + value / 2 * 8;
        const int64_t token = first_token + t * 8 + from % 4 * 2 + value % 2;
        if (row >= args.out.n || token >= args.out.m) return;
        sum = weights.finished(sum, row);
        if (args.out.bias) sum += load_float(args.out.bias, row, args.out.bias_dtype);
        static_cast<uint16_t*>(args.out.y)[token * args.out.n + row] = to_bits<T>(sum);
    }

    LLMKERN_DEVICE void run() const {
        if (lane < DEPTH) barrier_init(there + lane, 1);
        if (thread() == 0) barrier_init(x_there, 1);
        fence_barriers();
        sync_block();
        weights.prefetch(first_tile);
        dependency_wait();
        // x first: the copy engine does one after the other.
        ask_x();
        Place next = ask_first();
        barrier_wait(x_there, 0);
        sync_block();
        int slot = 0, buffer = 0, round = 0;
        uint32_t parity = 0;
#pragma unroll 1
        for (int tile = first_tile; tile < tiles; tile += tile_step, round++) {
            Sums acc = {};
            typename Weights::Rows rows{};
            weights.small_of(rows, tile, small + buffer * args.small_bytes);
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk++) {
                copy_async_wait<DEPTH - 1>();
                barrier_wait(there + slot, parity);
                sync_warp();  // scales that other lanes copied
                weights.multiply(acc, slots + slot * Weights::SLOT_BYTES, sides + slot * Weights::SIDE_BYTES, rows,
                                 chunk, x + (first_chunk + chunk) * Weights::CHUNK * 2);
                sync_warp();
                ask(next, slot);
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }
            if (++buffer == args.small_buffers) buffer = 0;
            finish(acc, tile, round);
        }
        copy_async_wait<0>();
        if (splits > 1) finish_cluster();
    }
};

// first, second: what the copy engine brings.
template <class Weights, class T, int TOKEN_TILES>
__global__ void __launch_bounds__(RING_WARPS * 32, 1)
    ring_kernel(RingArgs args, LLMKERN_GRID_CONSTANT TensorMap first, LLMKERN_GRID_CONSTANT TensorMap second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // which have barriers in shared memory and the copy engine
    const Ring<Weights, T, TOKEN_TILES> ring(args, first, second, block_x(), block_y(),
                                             int64_t(block_z()) * args.tokens);
    ring.run();
#endif
}

}  // namespace llmkern::cuda
