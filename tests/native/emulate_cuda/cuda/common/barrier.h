// In the place of csrc/cuda/common/barrier.h. Whoever arrives lets all others go on first: what those who waited do to
// memory that is still in use shows.
#pragma once

#include "cuda/common/instructions.h"

namespace llmkern::cuda {

struct alignas(8) Barrier {
    uint16_t arrivals, missing;
    uint32_t phase : 8;
    int32_t bytes : 24;  // of tiles (tensor_map.h), still to come
};

// What has not been written is all ones.
inline void check_barrier(const Barrier* barrier) {
    if (reinterpret_cast<uintptr_t>(barrier) % sizeof(Barrier)) throw std::runtime_error("a misaligned barrier");
    if (barrier->arrivals == 0xffff) throw std::runtime_error("a barrier that nobody has initialised");
}

inline void barrier_init(Barrier* barrier, int arrivals) {
    if (arrivals < 1 || arrivals > 1024) throw std::runtime_error("a barrier of no or too many arrivals");
    *barrier = {uint16_t(arrivals), uint16_t(arrivals), 0, 0};
    check_barrier(barrier);
}

// The next phase, if all have arrived and all tiles have come.
inline void turn_barrier(Barrier* barrier) {
    if (barrier->missing || barrier->bytes) return;
    barrier->missing = barrier->arrivals;
    barrier->phase++;
}

inline void count_arrival(Barrier* barrier) {
    check_barrier(barrier);
    if (barrier->missing == 0) throw std::runtime_error("more arrivals at a barrier than it is for");
    barrier->missing--;
    turn_barrier(barrier);
}

inline void barrier_arrive(Barrier* barrier) {
    count_arrival(barrier);
    emulated::others_first();
}

inline void land_tiles(Barrier* barrier) {
    auto& tiles = machine.tiles;
    for (size_t i = 0; i < tiles.size(); i++)
        if (tiles[i].barrier == barrier) {
            const auto tile = std::move(tiles[i]);
            tiles.erase(tiles.begin() + i--);
            std::memcpy(tile.to, tile.bytes.data(), tile.bytes.size());
            barrier->bytes -= int(tile.bytes.size());
            turn_barrier(barrier);
        }
}

inline void barrier_arrive_if(bool here, Barrier* barrier) {
    if (here) barrier_arrive(barrier);
}

inline void copy_async_arrive(Barrier* barrier) {
    auto& fiber = *machine.current;
    if (!fiber.groups.empty())
        throw std::runtime_error("copy_async_arrive: beside copies in groups it is not emulated");
    check_barrier(barrier);
    fiber.landings.push_back({std::move(fiber.open), [barrier] { count_arrival(barrier); }});
    fiber.open.clear();
    // Four land late, four at once, and so on.
    if (fiber.left++ / 4 % 2)
        while (!fiber.landings.empty()) emulated::land_oldest(fiber);
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
    check_barrier(barrier);
    if (parity > 1) throw std::runtime_error("barrier_wait: a parity is 0 or 1");
    emulated::wait_until([=] {
        land_tiles(barrier);
        return (barrier->phase & 1) != parity;
    });
}

template <int ID, int THREADS>
void sync_threads() {
    static_assert(0 < ID && ID < 16 && THREADS % 32 == 0, "");
    auto& named = machine.current->block->named[ID];
    if (!named) named = std::make_unique<emulated::Group>(THREADS);
    if (named->size != THREADS) throw std::runtime_error("sync_threads: not the same number of threads as before");
    meet(*named, named->arrived, "sync_threads", nullptr, [](void* const*) {});
}

template <int COUNT>
void fewer_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24, "");
}
template <int COUNT>
void more_registers() {
    static_assert(COUNT % 8 == 0 && COUNT <= 256, "");
}

}  // namespace llmkern::cuda
