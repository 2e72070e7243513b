// Scales and zeros of a tile's rows, for weights whose chunks of K are within a group (ring.h): of each row those of a
// warp's columns, [rows][scale_pitch], then [rows][zero_pitch]. They come with the tile's first unit, a row's at once:
// one by one each would take a sector of 32 bytes. A copy has at least 4 bytes, so what is less comes with its
// neighbours and is picked by its number.
#pragma once

#include "cuda/linear/ring.h"

namespace llmkern::cuda {

template <int CHUNK, int TILES, bool SCALED, bool ZEROS>
struct RingSmall {
    static constexpr int ROWS = 16 * TILES;

    struct Rows {  // of a lane in a tile: where the first group of this warp is
        const uint8_t* scale[TILES][2];
        const uint8_t* zero[TILES][2];
    };

    const RingArgs& args;
    const int first_chunk, chunks;  // of this warp
    const int lane = thread() % 32, g = lane / 4;

    // Groups in so many chunks of a row, at most.
    static int64_t groups_in(const RingArgs& args, int64_t chunks) {
        if (!SCALED) return ZEROS;
        const int64_t group_size = args.group_size.divisor;
        return ((chunks - 1) * CHUNK + group_size - 1) / group_size + 1;
    }
    // Whether every warp's scales of a row start at a multiple of 16 bytes.
    static bool units_fit(const RingArgs& args, int size) {
        bool fit = SCALED && args.groups * size % 16 == 0 && reinterpret_cast<uintptr_t>(args.scales) % 16 == 0;
        for (int split = 0; fit && split < 1 << args.split_shift; split++) {
            const int first = args.chunks * split >> args.split_shift;
            const int mine = (args.chunks * (split + 1) >> args.split_shift) - first;
            for (int warp = 0; warp < 1 << args.group_shift; warp++)
                fit &=
                    (first + (mine * warp >> args.group_shift)) * CHUNK / int(args.group_size.divisor) * size % 16 == 0;
        }
        return fit;
    }

    // The last row stands for those beyond it, and nobody stores them.
    LLMKERN_DEVICE int entry(int tile, int in_tile) const {
        return smaller(tile * ROWS + in_tile, int(args.out.n) - 1) * args.groups;
    }
    // Of a chunk of this warp's, from that of its first chunk on.
    LLMKERN_DEVICE int group(int chunk) const {
        return SCALED ? group_of(first_chunk + chunk) - group_of(first_chunk) : 0;
    }
    LLMKERN_DEVICE int group_of(int chunk) const { return SCALED ? args.group_size.divide(chunk * CHUNK) : 0; }

    LLMKERN_DEVICE bool wide() const { return args.scales_dtype == DType::F32; }
    LLMKERN_DEVICE const uint8_t* scale_word(int entry) const {
        return static_cast<const uint8_t*>(args.scales) + (wide() ? int64_t(entry) * 4 : int64_t(entry >> 1) * 4);
    }
    LLMKERN_DEVICE const uint8_t* zero_word(int entry) const {
        return reinterpret_cast<const uint8_t*>(args.zeros) + (entry & ~3);
    }

    // A lane copies a row's.
    LLMKERN_DEVICE void ask(uint8_t* to, int tile) const {
        if ((!SCALED && !ZEROS) || lane >= ROWS) return;
        const int mine = entry(tile, lane), first = mine + group_of(first_chunk);
        const int last = mine + group_of(first_chunk + chunks - 1);
        if (SCALED) {
            uint8_t* const row = to + lane * args.scale_pitch;
            const uint8_t* const from = scale_word(first);
            const int bytes = int(scale_word(last) - from) + 4;
            if (args.small_units)
                for (int i = 0; i < bytes; i += 16) copy_async_if(true, row + i, from + i);
            else
                for (int i = 0; i < bytes; i += 4) copy_async4(row + i, from + i);
        }
        if (ZEROS) {
            uint8_t* const row = to + ROWS * args.scale_pitch + lane * args.zero_pitch;
            const uint8_t* const from = zero_word(first);
            const int bytes = int(zero_word(last) - from) + 4;
            for (int i = 0; i < bytes; i += 4) copy_async4(row + i, from + i);
        }
    }

    LLMKERN_DEVICE void find(Rows& rows, int tile, const uint8_t* at) const {
        if constexpr (SCALED || ZEROS)
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                const int in_tile = 8 * i + g, first = entry(tile, in_tile) + group_of(first_chunk);
                rows.scale[i / 2][i % 2] = at + in_tile * args.scale_pitch + (wide() ? 0 : (first & 1) * 2);
                rows.zero[i / 2][i % 2] = at + ROWS * args.scale_pitch + in_tile * args.zero_pitch + (first & 3);
            }
    }

    LLMKERN_DEVICE float scale_of(const Rows& rows, int r, int h, int group) const {
        const uint8_t* const at = rows.scale[r][h] + group * (wide() ? 4 : 2);
        return bits_to_float(wide() ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at),
                             args.scales_dtype);
    }
    LLMKERN_DEVICE float zero_of(const Rows& rows, int r, int h, int group) const {
        return *reinterpret_cast<const int8_t*>(rows.zero[r][h] + group);
    }
};

}  // namespace llmkern::cuda
