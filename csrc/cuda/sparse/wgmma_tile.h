// Many rows of x and 2:4 weights on sm_90a: two warpgroups multiply 128 rows of w each, in two tiles, and a thread of
// the third has what they need copied to shared memory (wgmma_feed.h). Weights are the left factor, decoded to
// registers, where the next part (64 columns) becomes ready while a part's products are under way.
//
// A sparse product of 64 rows, TOKENS and 32 columns takes TOKENS / 2 clocks, in which it reads TOKENS * 64 bytes of x:
// all that shared memory gives. What else goes in and out of it, comes on top: in 4 such products x comes in once (a
// quarter), and the weights go in and out (values in x's type: half for 128 rows of x; int4: an eighth).
#pragma once

#include "cuda/common/wgmma_sparse.h"
#include "cuda/linear/bands.h"
#include "cuda/linear/cluster_sum.h"
#include "cuda/sparse/wgmma_feed.h"

namespace llmkern::cuda {

// Where scales go, see kept.h; of weights: one for each row of a stage, or for each product.
enum class SparseScaled { NOT, SUMS, STAGES, PRODUCTS };

template <class Format, class T, int TOKENS_, SparseScaled SCALED, bool SHARED_X>
struct SparseWgmma {
    static constexpr int ROW_TILES = 2, CONSUMERS = 256, THREADS = CONSUMERS + 128;
    static constexpr int ROWS = ROW_TILES * CONSUMERS / 2, TOKENS = TOKENS_;
    using Feed = SparseFeed<Format, ROWS, TOKENS, CONSUMERS / 32, SHARED_X>;
    static constexpr int PITCH = ROWS + 4;  // of sums in floats: the lanes of a store in different banks
    static constexpr int SUMS_BYTES = TOKENS * PITCH * int(sizeof(float));
    static constexpr int SHARED = Feed::BYTES > SUMS_BYTES ? Feed::BYTES : SUMS_BYTES;
    static constexpr bool WEIGHTS = SCALED == SparseScaled::STAGES || SCALED == SparseScaled::PRODUCTS;
    static constexpr int SLOTS = SCALED == SparseScaled::PRODUCTS ? 4 : 1;  // scales of a row in a stage

    struct Left {  // of a part; not to be touched while its products are under way
        uint32_t a[ROW_TILES][2][4];
        uint32_t positions[ROW_TILES];
    };
    using ScaleBits = uint32_t[ROW_TILES][2][SLOTS];  // of the next stage: nothing waits for them yet
    using Scales = PairScale[ROW_TILES][2][SLOTS];

    const SparseArgs& args;
    const Feed& feed;
    const int64_t first_row, first_token;
    const int g = thread() % 32 / 4, c = thread() % 4;
    const int warp_row = thread() / 128 * ROW_TILES * 64 + thread() / 32 % 4 * 16;

    LLMKERN_DEVICE SparseWgmma(const SparseArgs& args, const Feed& feed, int64_t first_row, int64_t first_token)
        : args(args), feed(feed), first_row(first_row), first_token(first_token) {}

    LLMKERN_DEVICE int row(int r, int h) const { return warp_row + 64 * r + 8 * h + g; }

    // Of the quads 4b + c of a part, b = 2s + i: product s takes them as its quads 4i + c.
    LLMKERN_DEVICE void pairs_of(const uint8_t* values, int row, int part, uint32_t (&pairs)[4]) const {
        if constexpr (std::is_same_v<Format, Kept16>) {
            // A product by one is a register of its own: the compiler sees a copy and its source as one, and does not
            // see that products still read it when the next part's comes.
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const uint8_t* const at = values + Feed::value_place(row, 4 * part + b) + 4 * c;
                pairs[b] = fma2<T>(*reinterpret_cast<const uint32_t*>(at), Magic<T>::ONE, MINUS_ZERO);
            }
        } else if constexpr (std::is_same_v<Format, KeptInt8>) {
            const uint32_t selector = Format::template selector<T>(c % 2);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const uint8_t* const at = values + Feed::value_place(row, 2 * part + b / 2) + b % 2 * 8 + c / 2 * 4;
                pairs[b] = Format::template pair<T>(*reinterpret_cast<const uint32_t*>(at), selector);
            }
        } else {
            const Words4 words = *reinterpret_cast<const Words4*>(values + Feed::value_place(row, part));
            const uint32_t selector = Format::template selector<T>(c);
#pragma unroll
            for (int b = 0; b < 4; b++) pairs[b] = Format::template pair<T>(words.w[b], selector);
        }
    }

    LLMKERN_DEVICE void decode(Left& left, const uint8_t* stage, int part, const Scales& scales,
                               const uint32_t (&beyond)[ROW_TILES]) const {
        const uint8_t* const values = stage + Feed::X_BYTES;
        const uint8_t* const positions = values + Feed::VALUE_BYTES + part * 8 + c * 2;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            uint32_t halves[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                // Lane 2s + i has those of the quads 4b to 4b + 3.
                halves[h] = *reinterpret_cast<const uint16_t*>(positions + row(r, h) * 16);
                uint32_t pairs[4];
                pairs_of(values, row(r, h), part, pairs);
#pragma unroll
                for (int b = 0; b < 4; b++)
                    left.a[r][b / 2][b % 2 * 2 + h] =
                        WEIGHTS ? scaled<T>(pairs[b], scales[r][h][SLOTS > 1 ? 2 * part + b / 2 : 0]) : pairs[b];
            }
            left.positions[r] = permute(halves[0], halves[1], 0x5410) | beyond[r];
        }
    }

    LLMKERN_DEVICE void settle_scales(Scales& scales, const ScaleBits& bits) const {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int slot = 0; slot < SLOTS; slot++)
                    scales[r][h][slot] = pair_scale<T>(bits_to_float(bits[r][h][slot], args.scales_dtype));
    }

    using Sums = float[ROW_TILES][TOKENS / 8][4];

    static LLMKERN_DEVICE void multiply(Sums& acc, const Left& left, const uint8_t* x) {
        wgmma_fence();
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            wgmma_sparse<T, TOKENS, 0>(acc[r], left.a[r][0], left.positions[r], describe(x, 0));
            wgmma_sparse<T, TOKENS, 1>(acc[r], left.a[r][1], left.positions[r], describe(x, 64));
        }
        wgmma_commit();
    }

    LLMKERN_DEVICE void load_scales(ScaleBits& bits, int stage) const {
        if constexpr (WEIGHTS) {
            stage = smaller(stage, feed.last - 1);
#pragma unroll
            for (int slot = 0; slot < SLOTS; slot++) {
                const int group = args.group_size.divide(stage * SPARSE_STAGE + slot * (SPARSE_STAGE / SLOTS));
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        bits[r][h][slot] = load_bits(
                            args.scales, smaller<int64_t>(first_row + row(r, h), args.out.n - 1) * args.groups + group,
                            args.scales_dtype);
            }
        }
    }

    // Sums to shared memory. A stage at least, so that what sets sums to zero does not stand between products.
    LLMKERN_DEVICE void run(int split) const {
        Sums acc = {};
        Left left[2];  // of the even parts, of the odd ones
        ScaleBits bits;
        Scales scales;
        typename Feed::Slot slot;
        uint32_t
            beyond[ROW_TILES];  // rows that do not exist: positions there are 0 and 1, since none is twice the same
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            beyond[r] = (first_row + row(r, 0) < args.out.n ? 0 : 0x00004444) |
                        (first_row + row(r, 1) < args.out.n ? 0 : 0x44440000);
        load_scales(bits, feed.first);
        int stage = feed.first;
#pragma unroll 1
        do {
            if constexpr (WEIGHTS) {
                settle_scales(scales, bits);
                load_scales(bits, stage + 1);
            }
            const uint8_t* const at = Feed::stage_at(slot.at);
            const int before = slot.at == 0 ? Feed::STAGES - 1 : slot.at - 1;
            barrier_wait(Feed::full(slot.at), slot.parity);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                decode(left[part], at, part, scales, beyond);
                multiply(acc, left[part], at + part * Feed::PART_BYTES);
                wgmma_wait<1>();  // the part before, whose registers are free now
                if (part == 0) Feed::release(before, stage > feed.first, split);
            }
            slot.next();
        } while (++stage < feed.last);
        wgmma_wait<0>();
        sync_threads<1, CONSUMERS>();  // everyone is done with what stands where sums go
        float* const sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[(8 * t + 2 * c + i % 2) * PITCH + row(r, i / 2)] = acc[r][t][i];
    }

    // By the first CONSUMERS threads: neighbours in a row of y together, and what the cluster's blocks have added up,
    // of which each has a share of the rows of x.
    LLMKERN_DEVICE void store(int split, int rank) const {
        const float* const sums = reinterpret_cast<const float*>(shared_memory());
        constexpr int QUARTETS = ROWS / 4, AT_ONCE = CONSUMERS / QUARTETS;
        const Output& out = args.out;
        const int quartet = thread() % QUARTETS;
        const int64_t row = first_row + 4 * quartet;
        const bool whole = out.n % 4 == 0 && reinterpret_cast<uintptr_t>(out.y) % 8 == 0;
        const int tokens = int(smaller<int64_t>(out.m - first_token, TOKENS));
        if (row >= out.n) return;
        float scale[4], bias[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t at = smaller<int64_t>(row + i, out.n - 1);
            scale[i] = SCALED == SparseScaled::SUMS ? load_float(args.scales, at, args.scales_dtype) : 1.0f;
            bias[i] = out.bias ? load_float(out.bias, at, out.bias_dtype) : 0.0f;
        }
        for (int t = thread() / QUARTETS + split * AT_ONCE; t < tokens; t += args.splits * AT_ONCE) {
            float sum[4];
            cluster_sum<Feed::BLOCKS>(sums + t * PITCH + 4 * quartet, args.splits, sum, rank);
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] = sum[i] * scale[i] + bias[i];
            const Words2 y = {pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3])};
            uint16_t* const to = static_cast<uint16_t*>(out.y) + (first_token + t) * out.n + row;
            if (whole) {
                *reinterpret_cast<Words2*>(to) = y;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (row + i < out.n) to[i] = uint16_t(y.w[i / 2] >> i % 2 * 16);
            }
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    sparse_wgmma_kernel(SparseArgs args, LLMKERN_GRID_CONSTANT TensorMap x, LLMKERN_GRID_CONSTANT TensorMap values,
                        LLMKERN_GRID_CONSTANT TensorMap positions) {
#if LLMKERN_HAS_WGMMA
    using Feed = typename Tile::Feed;
    const int rank = block_x() % Feed::BLOCKS, split = block_y();
    int64_t first_row, first_token;
    tile_of<Feed::BLOCKS * Tile::ROWS, Tile::TOKENS>(args.out, block_x() / Feed::BLOCKS, first_row, first_token);
    first_row += rank * Tile::ROWS;
    const Feed feed(args, split);
    const Tile tile(args, feed, first_row, first_token);
    Feed::init();
    dependency_wait();
    if (thread() < Tile::CONSUMERS) {
        more_registers<232>();
        tile.run(split);
        args.splits > 1 ? sync_cluster() : sync_threads<1, Tile::CONSUMERS>();
        tile.store(split, rank);
        // Nobody leaves while another reads its memory, or says there that it has used a stage.
        if (Feed::BLOCKS > 1 || args.splits > 1) sync_cluster();
    } else {
        fewer_registers<40>();
        if (thread() == Tile::CONSUMERS) feed.copy(x, values, positions, int(first_row), int(first_token), rank, split);
    }
#endif
}

}  // namespace llmkern::cuda
