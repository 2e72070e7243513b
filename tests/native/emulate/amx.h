// The AMX intrinsics that csrc uses, on arrays of each thread. What a processor answers with an exception ends the
// process here too: a tile that is not configured, shapes that do not fit. See immintrin.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "avx512.h"

namespace emulate {

// The layout of ldtilecfg's operand.
struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the operand of ldtilecfg");

struct Tile {
    alignas(64) uint8_t at[16][64];
};

struct TileState {
    TileConfig config;
    Tile tiles[8];
};

// `inline`: one for all files of the module, as the registers are.
inline thread_local TileState tile_state;

static inline void refuse_unless(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

static inline void load_config(const void* from) {
    TileConfig config;
    std::memcpy(&config, from, sizeof config);
    refuse_unless(config.palette <= 1 && config.start_row == 0, "a palette other than 0 and 1, or a start row");
    for (int i = 0; i < 14; ++i) refuse_unless(config.reserved[i] == 0, "reserved bytes of the configuration");
    for (int i = 0; i < 16; ++i) {
        const bool used = config.row_bytes[i] != 0 && config.rows[i] != 0;
        refuse_unless(used || (config.row_bytes[i] == 0 && config.rows[i] == 0), "rows without bytes or the reverse");
        refuse_unless(config.row_bytes[i] <= (i < 8 ? 64 : 0) && config.rows[i] <= (i < 8 ? 16 : 0),
                      "a tile too large");
    }
    tile_state = {};
    if (config.palette) tile_state.config = config;
}

static inline void store_config(void* to) { std::memcpy(to, &tile_state.config, sizeof(TileConfig)); }

static inline int rows_of(int tile) { return tile_state.config.rows[tile]; }
static inline int bytes_of(int tile) { return tile_state.config.row_bytes[tile]; }

static inline Tile& configured(int tile) {
    refuse_unless(tile_state.config.palette == 1 && rows_of(tile) > 0, "a tile that is not configured");
    return tile_state.tiles[tile];
}

// Rows and bytes past the configured ones become 0 whenever a tile is written.
static inline void load_tile(int tile, const void* from, int64_t stride) {
    Tile& t = configured(tile);
    std::memset(t.at, 0, sizeof t.at);
    for (int r = 0; r < rows_of(tile); ++r)
        std::memcpy(t.at[r], static_cast<const char*>(from) + r * stride, static_cast<size_t>(bytes_of(tile)));
}

static inline void store_tile(int tile, void* to, int64_t stride) {
    const Tile& t = configured(tile);
    for (int r = 0; r < rows_of(tile); ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, t.at[r], static_cast<size_t>(bytes_of(tile)));
}

static inline void zero_tile(int tile) { std::memset(configured(tile).at, 0, sizeof(Tile)); }

// Calls use(row, column) for every sum of c += a * b.
template <class Use>
static inline void for_sums(int c, int a, int b, Use use) {
    refuse_unless(c != a && c != b && a != b, "a product of tiles that are not three");
    configured(c), configured(a), configured(b);
    refuse_unless(rows_of(c) == rows_of(a) && bytes_of(c) == bytes_of(b) && bytes_of(a) == 4 * rows_of(b) &&
                      bytes_of(c) % 4 == 0 && bytes_of(a) % 4 == 0,
                  "a product of tiles whose shapes do not fit");
    for (int row = 0; row < rows_of(c); ++row)
        for (int column = 0; column < bytes_of(c) / 4; ++column) use(row, column);
}

template <class A, class B>
static inline void add_byte_tiles(int c, int a, int b) {
    Tile &to = tile_state.tiles[c], &x = tile_state.tiles[a], &y = tile_state.tiles[b];
    for_sums(c, a, b, [&](int row, int column) {
        uint32_t sum;
        std::memcpy(&sum, to.at[row] + 4 * column, 4);
        for (int i = 0; i < bytes_of(a); ++i)
            sum +=
                static_cast<uint32_t>(static_cast<A>(x.at[row][i]) * static_cast<B>(y.at[i / 4][4 * column + i % 4]));
        std::memcpy(to.at[row] + 4 * column, &sum, 4);
    });
}

// The first and the second products of all pairs are two sums, which meet before they are added to the tile.
static inline void add_bf16_tiles(int c, int a, int b) {
    Tile &to = tile_state.tiles[c], &x = tile_state.tiles[a], &y = tile_state.tiles[b];
    for_sums(c, a, b, [&](int row, int column) {
        float sum, part[2] = {};
        for (int pair = 0; pair < bytes_of(a) / 4; ++pair) {
            uint16_t from_x[2], from_y[2];
            std::memcpy(from_x, x.at[row] + 4 * pair, 4);
            std::memcpy(from_y, y.at[pair] + 4 * column, 4);
            for (int i = 0; i < 2; ++i) part[i] = add_product(part[i], from_bf16(from_x[i]), from_bf16(from_y[i]));
        }
        std::memcpy(&sum, to.at[row] + 4 * column, 4);
        sum = flushed(flushed(sum) + flushed(part[0] + part[1]));
        std::memcpy(to.at[row] + 4 * column, &sum, 4);
    });
}

}  // namespace emulate

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulate::load_config(from)
#define _tile_storeconfig(to) emulate::store_config(to)
#define _tile_release() (emulate::tile_state = {}, void())
#define _tile_loadd(tile, from, stride) emulate::load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) emulate::store_tile(tile, to, stride)
#define _tile_zero(tile) emulate::zero_tile(tile)
#define _tile_dpbssd(c, a, b) emulate::add_byte_tiles<int8_t, int8_t>(c, a, b)
#define _tile_dpbf16ps(c, a, b) emulate::add_bf16_tiles(c, a, b)
