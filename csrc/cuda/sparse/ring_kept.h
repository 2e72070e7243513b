// 2:4 weights for ring.h: values in x's type and int4 codes, K in its natural order. A product takes 32 columns: of w
// their 16 kept values, of x 64 bytes, which ldmatrix gives to the lanes that want them.
//
//   slot   kept values of 128 columns: [16 rows][128 bytes], or int4 [32 rows][32 bytes], swizzled by the copy engine
//   side   positions [rows][16 bytes]
//
// One register of positions serves two products: of the 8 bytes for 64 columns of a row lane c takes two, and the
// selector says which two lanes' a product uses (common/instructions.h `mma_sparse`).
#pragma once

#include "cuda/linear/ring_small.h"
#include "cuda/sparse/kept.h"

namespace llmkern::cuda {

template <class Format, class T, int TOKEN_TILES, RingScales SCALES>
struct RingKept {
    static constexpr bool HALVES = std::is_same_v<Format, Kept16>;
    static constexpr int TILES = HALVES ? 1 : 2, ROWS = 16 * TILES, CHUNK = 128;
    static constexpr int ROW_BYTES = HALVES ? 128 : 32, POSITION_BYTES = 16;
    static constexpr int SLOT_BYTES = ROWS * ROW_BYTES, SIDE_BYTES = ROWS * POSITION_BYTES;
    static constexpr bool SCALED = SCALES == RingScales::SUMS;
    using Small = RingSmall<CHUNK, TILES, SCALED, false>;
    using Rows = typename Small::Rows;

    const RingArgs& args;
    const TensorMap& values;
    const TensorMap& positions;
    const int first_chunk, chunks;  // of this warp
    const int lane = thread() % 32, g = lane / 4, c = lane % 4;
    const Small small{args, first_chunk, chunks};

    LLMKERN_DEVICE void prefetch(int tile) const {
        if (lane == 0)
            for (int d = 0; d < RING_DEPTH<TOKEN_TILES> && d < chunks; d++) {
                prefetch_tile(values, (first_chunk + d) * ROW_BYTES, tile * ROWS);
                prefetch_tile(positions, (first_chunk + d) * POSITION_BYTES, tile * ROWS);
            }
    }

    LLMKERN_DEVICE void ask_small(uint8_t* to, int tile) const { small.ask(to, tile); }
    LLMKERN_DEVICE void small_of(Rows& rows, int tile, const uint8_t* at) const { small.find(rows, tile, at); }

    LLMKERN_DEVICE void ask(uint8_t* slot, uint8_t* side, int tile, int chunk, Barrier* there) const {
        if (lane == 0) {
            barrier_expect(there, SLOT_BYTES + SIDE_BYTES);
            copy_tile(slot, values, (first_chunk + chunk) * ROW_BYTES, tile * ROWS, there);
            copy_tile(side, positions, (first_chunk + chunk) * POSITION_BYTES, tile * ROWS, there);
        }
    }

    // Of two products.
    LLMKERN_DEVICE uint32_t positions_of(const uint8_t* side, int r, int pair) const {
        const uint8_t* const at = side + (16 * r + g) * POSITION_BYTES + 8 * pair + 2 * c;
        const uint32_t low = *reinterpret_cast<const uint16_t*>(at);
        const uint32_t high = *reinterpret_cast<const uint16_t*>(at + 8 * POSITION_BYTES);
        return permute(low, high, 0x5410);
    }

    // The left factor of a product: rows of 32 bytes, which lane 8i + j points to as ldmatrix wants it.
    LLMKERN_DEVICE void halves(uint32_t (&a)[4], const uint8_t* slot, int product) const {
        const int row = lane / 8 % 2 * 8 + lane % 8, unit = 2 * product + lane / 16;
        load_matrices(a, slot + row * ROW_BYTES + (unit ^ row % 8) * 16);
    }

    // The same from codes: byte c of a row's two words.
    static LLMKERN_DEVICE uint32_t kept_pair(uint32_t word, uint32_t selector) {
        constexpr uint32_t OFFSET = uint32_t(Magic<T>::NEGATIVE + 8) * 0x00010001;
        const uint32_t nibbles = permute(word, word >> 4, selector);
        return fma2<T>(mask_or(nibbles, 0x000f000f, Magic<T>::PAIR), Magic<T>::ONE, OFFSET);
    }

    // chunk: of this warp's; x: of the chunk.
    LLMKERN_DEVICE void multiply(float (&acc)[TILES][TOKEN_TILES][4], const uint8_t* slot, const uint8_t* side,
                                 const Rows& rows, int chunk, const uint8_t* x) const {
        float sums[TILES][TOKEN_TILES][4] = {};
        auto& into = SCALED ? sums : acc;
        const uint32_t selector = c * 0x1111 + 0x4400;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t where[TILES];
            Words4 codes[TILES][2];
#pragma unroll
            for (int r = 0; r < TILES; r++) {
                where[r] = positions_of(side, r, pair);
                if (!HALVES)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int row = 16 * r + 8 * h + g;
                        codes[r][h] =
                            *reinterpret_cast<const Words4*>(slot + row * ROW_BYTES + (pair ^ (row / 4 % 2)) * 16);
                    }
            }
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint32_t b[TOKEN_TILES][4];
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++) {
                    const int token = smaller(8 * t + lane % 8, args.tokens - 1);
                    load_matrices(b[t], x + token * args.x_pitch + (2 * pair + s) * 64 + lane / 8 * 16);
                }
#pragma unroll
                for (int r = 0; r < TILES; r++) {
                    uint32_t a[4];
                    if (HALVES)
                        halves(a, slot, 2 * pair + s);
                    else
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            a[h] = kept_pair(codes[r][h].w[2 * s], selector);
                            a[2 + h] = kept_pair(codes[r][h].w[2 * s + 1], selector);
                        }
#pragma unroll
                    for (int t = 0; t < TOKEN_TILES; t++) {
                        if (s == 0)
                            mma_sparse<T, 0>(into[r][t], a, b[t], where[r]);
                        else
                            mma_sparse<T, 1>(into[r][t], a, b[t], where[r]);
                    }
                }
            }
        }
        if (!SCALED) return;
        const int group = small.group(chunk);
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float scale = small.scale_of(rows, r, h, group);
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                    for (int i = 0; i < 2; i++) acc[r][t][2 * h + i] += scale * sums[r][t][2 * h + i];
            }
    }

    LLMKERN_DEVICE float finished(float sum, int64_t row) const {
        return SCALED || !args.scales ? sum : sum * load_float(args.scales, row, args.scales_dtype);
    }
};

}  // namespace llmkern::cuda
