// A GPU on a CPU, for values: every thread of a block (of all blocks of a cluster) is a fiber, run in turns. A fiber
// goes on until it waits: for the block, for its warp's other lanes, for the cluster. It shows arithmetic, indices,
// barriers that are missing or not met by all, and what asynchronous copies leave unwritten. It shows nothing of speed.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace llmkern::cuda::emulated {

constexpr int LANES = 32;

struct Index {
    int x, y, z;
};

struct Group {  // threads that meet: a warp, four warps, a block, a cluster
    explicit Group(int size) : size(size), records(size) {}
    int size;
    int arrived = 0;
    long generation = 0;
    const char* operation = nullptr;
    std::vector<void*> records;
};

struct Copy {  // of copy_async, not done before it is waited for, or at once
    uint8_t* to;
    bool done;
    int size;
    uint8_t bytes[16];
};

struct Landing {  // of copies that arrive at a barrier: at once, or not before everybody waits for something
    std::vector<Copy> copies;
    std::function<void()> arrive;
};

struct AsyncProduct {  // of a warpgroup (wgmma.h), not done before it is waited for
    void* d;
    const void* a;  // registers, or null: a_shared
    uint64_t a_shared, b_shared;
    void (*run)(const AsyncProduct* const* threads);
    const uint32_t* positions = nullptr;  // of a sparse a
};

struct Tile {  // of copy_tile, not there before its barrier is waited for
    uint8_t* to;
    std::vector<uint8_t> bytes;
    void* barrier;
};

struct Block {
    Index index;
    std::vector<uint8_t> memory;
    uint8_t* shared;  // aligned, in memory
    std::vector<Group> warps, warpgroups;
    Group all;
    std::unique_ptr<Group> named[16];  // sync_threads, by number
    // How many landings there were, in all and until that of every 16 bytes.
    int landings = 0;
    std::vector<int> landed;
    int running;
    Block(Index index, int threads, size_t shared_bytes);
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<uint8_t[]> stack;
    Block* block;
    int thread;
    int rank;  // of the block in its cluster
    bool done = false;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
    std::deque<Landing> landings;
    int left = 0;           // to barriers, landed ones too
    int fenced = 0;         // landings that products of a warpgroup can see
    bool unfenced = false;  // copies have landed that products of a warpgroup cannot see yet
    std::vector<std::vector<AsyncProduct>> product_groups;  // committed, oldest first
    std::vector<AsyncProduct> open_products;
    bool registers_fenced = false;
};

struct Machine {
    Fiber* current = nullptr;
    std::vector<Fiber*> fibers;  // of the cluster's blocks
    std::vector<std::unique_ptr<Block>> cluster;
    std::unique_ptr<Group> cluster_group;
    std::vector<Tile> tiles;
    long steps = 0;  // of any fiber past something that it waited for
};

extern Machine machine;

// Back to the others, until `ready`.
void wait_until(const std::function<bool()>& ready);

// Back to the others, who all have a turn.
void others_first();

// The oldest of the copies that a thread has left to a barrier land, and arrive.
void land_oldest(Fiber& fiber);

// Every thread of the group brings a record; the last one runs `work` on all of them. Raises when they do not come for
// the same operation.
void meet(Group& group, int place, const char* operation, void* record, const std::function<void(void* const*)>& work);

inline Group& my_warp() { return machine.current->block->warps[machine.current->thread / LANES]; }
inline Group& my_warpgroup() { return machine.current->block->warpgroups[machine.current->thread / (4 * LANES)]; }
inline int my_lane() { return machine.current->thread % LANES; }

// Runs `body` for every thread of every block.
void run(Index grid, int threads, size_t shared_bytes, Index cluster, const std::function<void()>& body);

}  // namespace llmkern::cuda::emulated
