// Sums of wgmma_kernel to y, through shared memory so that neighbours in a row of y are stored together, those of the
// cluster's blocks added in a fixed order.
#pragma once

#include "cuda/linear/wgmma_ring.h"

namespace llmkern::cuda {

// PIECE: tiles of 8 rows of x at a time. DIVIDED: K among a cluster's blocks. acc: as mma's d, from row first_row of
// the block; by the ring's users.
template <class T, class Ring, int PIECE, bool DIVIDED>
struct WgmmaStore {
    static constexpr int PITCH = Ring::ROWS + 4;  // in floats: lanes of one store touch all banks
    static constexpr int BYTES = PIECE * 8 * PITCH * int(sizeof(float));
    static constexpr int QUADS = Ring::ROWS / 4;
    static constexpr int STEP = Ring::USERS / QUADS;  // rows of x at a time
    static_assert(Ring::USERS % QUADS == 0, "a thread keeps its rows");

    static LLMKERN_DEVICE void sync_users() { sync_threads<1, Ring::USERS>(); }

    template <int TOKEN_TILES>
    static LLMKERN_DEVICE void run(const float (&acc)[TOKEN_TILES][4], float* sums, const TileArgs& args,
                                   const WgmmaPart& part, int split, int first_row) {
        const int g = thread() % 32 / 4, c = thread() % 4, quad = thread() % QUADS;
        const int n = int(args.out.n), row = part.first_row + 4 * quad;
#pragma unroll
        for (int first = 0; first < TOKEN_TILES; first += PIECE) {
            if (first * 8 >= part.tokens) break;
            sync_users();  // what stood there has been read
#pragma unroll
            for (int t = first; t < TOKEN_TILES && t < first + PIECE; t++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sums[((t - first) * 8 + 2 * c + i % 2) * PITCH + first_row + g + i / 2 * 8] = acc[t][i];
            DIVIDED ? sync_cluster() : sync_users();
            const float* const from = sums + 4 * quad;
            const int here = smaller(part.tokens - first * 8, PIECE * 8);
            uint16_t* const to = static_cast<uint16_t*>(args.out.y) + int64_t(part.first_token + first * 8) * n + row;
            if constexpr (!DIVIDED)
                put<1>(to, from, here, n, n - row, 0, 1);
            else if (args.splits == 2)
                put<2>(to, from, here, n, n - row, split, 2);
            else if (args.splits <= 4)
                put<4>(to, from, here, n, n - row, split, args.splits);
            else
                put<8>(to, from, here, n, n - row, split, args.splits);
            if (DIVIDED) sync_cluster();  // nobody goes on while another reads its memory
        }
    }

    // This thread's rows and its share of `here` rows of x, of up to MOST blocks. Several are read before the first is
    // used: other blocks' memory is far.
    template <int MOST>
    static LLMKERN_DEVICE void put(uint16_t* to, const float* from, int here, int n, int rows, int split, int splits) {
        constexpr int BATCH = MOST > 1 ? 8 / MOST : PIECE * 8 / STEP < 4 ? PIECE * 8 / STEP : 4;
        const int stride = splits * STEP, quad = thread() % QUADS, token = thread() / QUADS + split * STEP;
        const Floats4 factor = reinterpret_cast<const Floats4*>(Ring::factors())[quad];
        const Floats4 bias = reinterpret_cast<const Floats4*>(Ring::biases())[quad];
#pragma unroll 1
        for (int first = token; first < here; first += BATCH * stride) {
            Floats4 parts[BATCH][MOST];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
#pragma unroll
                for (int rank = 0; rank < MOST; rank++) {
                    const int at = smaller(first + b * stride, PIECE * 8 - 1) * PITCH;
                    const Floats4* const mine = reinterpret_cast<const Floats4*>(from + at);
                    if (MOST == 1)
                        parts[b][rank] = *mine;
                    else if (rank < splits)
                        parts[b][rank] = load_cluster(mine, rank);
                }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                Floats4 sum = parts[b][0];
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int rank = 1; rank < MOST; rank++)
                        if (rank < splits) sum.f[i] += parts[b][rank].f[i];
                    sum.f[i] = sum.f[i] * factor.f[i] + bias.f[i];
                }
                const int at = first + b * stride;
                if (at < here) put_quad(to + int64_t(at) * n, sum, smaller(rows, 4), n % 4 == 0);
            }
        }
    }

    // `count` of four; whole: there are four, or none, at a multiple of 8 bytes.
    static LLMKERN_DEVICE void put_quad(uint16_t* to, const Floats4& sum, int count, bool whole) {
        const Words2 pairs = {{pack2<T>(sum.f[0], sum.f[1]), pack2<T>(sum.f[2], sum.f[3])}};
        if (whole) {
            if (count > 0) *reinterpret_cast<Words2*>(to) = pairs;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < count) to[i] = uint16_t(pairs.w[i / 2] >> 16 * (i % 2));
        }
    }
};

}  // namespace llmkern::cuda
