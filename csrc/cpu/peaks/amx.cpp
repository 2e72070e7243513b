// tdpbf16ps and tdpbssd: four sums of 16 x 16 from two tiles of each factor, all in tile registers.
#include <immintrin.h>

#include <cstdint>

#define LLMKERN_NS amx

namespace llmkern::amx {
namespace {

// The layout of ldtilecfg: palette 1, eight tiles of 16 rows of 64 bytes.
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Config CONFIG;

// Zeroed tiles, released at the end: a thread must not keep a configuration that others do not expect.
class Tiles {
  public:
    Tiles() {
        _tile_loadconfig(&CONFIG);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
        _tile_zero(6);
        _tile_zero(7);
    }
    ~Tiles() { _tile_release(); }
};

int64_t fp32(int64_t) { return 0; }

int64_t bf16(int64_t rounds) {
    const Tiles tiles;
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return rounds * 4 * 2 * 16 * 16 * 32;
}

int64_t int8(int64_t rounds) {
    const Tiles tiles;
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    return rounds * 4 * 2 * 16 * 16 * 64;
}

}  // namespace
}  // namespace llmkern::amx

#include "cpu/peaks/kernel.inl"
