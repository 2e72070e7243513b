// In the place of csrc/cuda/common/tensor_map.h. Every other tile comes when its barrier is waited for, so that what is
// read or overwritten too early shows.
#pragma once

#include "cuda/common/barrier.h"

#define LLMKERN_GRID_CONSTANT const

namespace llmkern::cuda {

struct TensorMap {
    const uint8_t* at;
    int64_t columns, rows, row_bytes;
    int box_columns, box_rows;
};

inline TensorMap tensor_map(const char*, const void* at, int64_t columns, int64_t rows, int64_t row_bytes,
                            int box_columns, int box_rows) {
    if (reinterpret_cast<uintptr_t>(at) % 16 || row_bytes % 16) throw std::runtime_error("tensor_map: misaligned");
    if (box_rows < 1 || box_rows > 256 || box_columns % 16 || box_columns > 128)
        throw std::runtime_error("tensor_map: no such box");
    return {static_cast<const uint8_t*>(at), columns, rows, row_bytes, box_columns, box_rows};
}

inline void barrier_expect(Barrier* barrier, int bytes) {
    check_barrier(barrier);
    barrier->bytes += bytes;
    barrier_arrive(barrier);
}

inline void fence_barriers() {}

template <class V>
V* at_block(V* mine, int rank) {
    const auto offset = reinterpret_cast<uint8_t*>(mine) - shared_memory();
    return reinterpret_cast<V*>(machine.cluster.at(rank)->shared + offset);
}

inline void barrier_arrive_at_if(bool here, Barrier* barrier, int rank) {
    if (here) barrier_arrive(at_block(barrier, rank));
}

inline void prefetch_map(const TensorMap&) {}
inline void prefetch_tile(const TensorMap&, int, int) {}

inline void send(emulated::Tile&& tile, Barrier* barrier) {
    static bool later = false;
    later = !later;
    machine.tiles.push_back(std::move(tile));
    if (!later) land_tiles(barrier);
}

inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
    const auto* const at = static_cast<const uint8_t*>(from);
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes < 16)
        throw std::runtime_error("copy_bytes: not in multiples of 16 bytes");
    send({static_cast<uint8_t*>(to), std::vector<uint8_t>(at, at + bytes), barrier}, barrier);
}

inline void copy_tile_to_block(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
    // Swizzled places count from multiples of eight rows.
    if (reinterpret_cast<uintptr_t>(to) % (8 * map.box_columns))
        throw std::runtime_error("copy_tile: a tile at no multiple of eight of its rows");
    std::vector<uint8_t> tile(map.box_rows * map.box_columns);
    for (int r = 0; r < map.box_rows; r++)
        for (int b = 0; b < map.box_columns; b++)
            if (row + r < map.rows && column + b < map.columns) {
                const int place = r * map.box_columns + b, swizzle = place >> 7 & (map.box_columns / 16 - 1);
                tile[place ^ swizzle << 4] = map.at[(row + r) * map.row_bytes + column + b];
            }
    send({static_cast<uint8_t*>(to), std::move(tile), barrier}, barrier);
}

inline void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
    copy_tile_to_block(to, map, column, row, barrier);
}

inline void copy_tile_to(uint16_t blocks, void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
    for (size_t rank = 0; rank < machine.cluster.size(); rank++)
        if (blocks >> rank & 1)
            copy_tile_to_block(at_block(static_cast<uint8_t*>(to), rank), map, column, row, at_block(barrier, rank));
}

}  // namespace llmkern::cuda
