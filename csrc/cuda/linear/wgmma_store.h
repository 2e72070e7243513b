// Sums of wgmma_kernel to y, through shared memory so that neighbours in a row of y are stored together, those of the
// cluster's blocks added in a fixed order.
#pragma once

#include "cuda/linear/wgmma_ring.h"

namespace llmkern::cuda {

// PIECE: tiles of 8 rows of x at a time. DIVIDED: K among a cluster's blocks. acc[r]: as mma's d, from row row_of(r) of
// the block; by the ring's users.
template <class T, class Ring, int PIECE, bool DIVIDED>
struct WgmmaStore {
    static constexpr int PITCH = Ring::ROWS + 4;  // in floats: lanes of one store touch all banks
    static constexpr int BYTES = PIECE * 8 * PITCH * int(sizeof(float));
    static constexpr int QUADS = Ring::ROWS / 4;
    static constexpr int STEP = Ring::USERS / QUADS;  // rows of x at a time
    static_assert(Ring::USERS % QUADS == 0, "a thread keeps its rows");

    static LLMKERN_DEVICE void sync_users() { sync_threads<1, Ring::USERS>(); }

    // of_row: factor and bias of row thread() of the block.
    template <int ROW_TILES, int TOKEN_TILES, class RowOf>
    static LLMKERN_DEVICE void run(const float (&acc)[ROW_TILES][TOKEN_TILES][4], float* sums, const TileArgs& args,
                                   const WgmmaPart& part, int split, const float (&of_row)[2], RowOf row_of) {
        const int g = thread() % 32 / 4, c = thread() % 4, quad = thread() % QUADS;
        const int n = int(args.out.n), row = part.first_row + 4 * quad;
#pragma unroll
        for (int first = 0; first < TOKEN_TILES; first += PIECE) {
            if (first * 8 >= part.tokens) break;
            sync_users();  // what stood there has been read
            if (first == 0 && thread() < Ring::ROWS)
                Ring::factors()[thread()] = of_row[0], Ring::biases()[thread()] = of_row[1];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int t = first; t < TOKEN_TILES && t < first + PIECE; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sums[((t - first) * 8 + 2 * c + i % 2) * PITCH + row_of(r) + g + i / 2 * 8] = acc[r][t][i];
            DIVIDED ? sync_cluster() : sync_users();
            const float* const from = sums + 4 * quad;
            const int here = smaller(part.tokens - first * 8, PIECE * 8);
            uint16_t* const to = static_cast<uint16_t*>(args.out.y) + int64_t(part.first_token + first * 8) * n + row;
            if constexpr (!DIVIDED)
                put<1>(to, from, here, n, n - row, 0);
            else if (args.splits == 2)
                put<2>(to, from, here, n, n - row, split);
            else if (args.splits == 4)
                put<4>(to, from, here, n, n - row, split);
            else
                put<8>(to, from, here, n, n - row, split);
            if (DIVIDED) sync_cluster();  // nobody goes on while another reads its memory
        }
    }

    // This thread's rows and its share of `here` rows of x. Several are read before the first is used: other blocks'
    // memory is far.
    template <int SPLITS>
    static LLMKERN_DEVICE void put(uint16_t* to, const float* from, int here, int n, int rows, int split) {
        constexpr int STRIDE = SPLITS * STEP, ALL = PIECE * 8 / STRIDE, MOST = SPLITS == 1 ? 4 : 8 / SPLITS;
        constexpr int BATCH = ALL < MOST ? ALL : MOST;
        static_assert(BATCH > 0 && ALL % BATCH == 0, "");
        const int quad = thread() % QUADS, token = thread() / QUADS + split * STEP;
        const Floats4 factor = reinterpret_cast<const Floats4*>(Ring::factors())[quad];
        const Floats4 bias = reinterpret_cast<const Floats4*>(Ring::biases())[quad];
        from += token * PITCH, to += int64_t(token) * n;
#pragma unroll 1
        for (int first = token; first < here; first += BATCH * STRIDE) {
            Floats4 parts[BATCH][SPLITS];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
#pragma unroll
                for (int rank = 0; rank < SPLITS; rank++) {
                    const Floats4* const at = reinterpret_cast<const Floats4*>(from + b * STRIDE * PITCH);
                    parts[b][rank] = SPLITS == 1 ? *at : load_cluster(at, rank);
                }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                Floats4 sum = parts[b][0];
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int rank = 1; rank < SPLITS; rank++) sum.f[i] += parts[b][rank].f[i];
                    sum.f[i] = sum.f[i] * factor.f[i] + bias.f[i];
                }
                if (first + b * STRIDE < here) put_quad(to, sum, smaller(rows, 4), n % 4 == 0);
                to += int64_t(STRIDE) * n;
            }
            from += BATCH * STRIDE * PITCH;
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
