#include "machine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

namespace llmkern::cuda::emulated {

Machine machine;

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
ucontext_t scheduler;
std::exception_ptr failure;
const std::function<void()>* kernel_body = nullptr;

// A cluster waits for the threads that have not ended.
void leave(Group& cluster) {
    if (--cluster.size == cluster.arrived && cluster.size) {
        cluster.arrived = 0;
        cluster.generation++;
    }
}

void enter() {
    Fiber* const me = machine.current;
    try {
        (*kernel_body)();
        bool waited = me->open.empty() && me->landings.empty();
        for (const auto& group : me->groups) waited = waited && group.empty();
        // What nobody waited for may land when the memory is another block's.
        if (!waited) throw std::runtime_error("a thread ended with asynchronous copies that it never waited for");
        if (!me->product_groups.empty() || !me->open_products.empty())
            throw std::runtime_error("a thread ended with asynchronous products that it never waited for");
    } catch (...) {
        failure = std::current_exception();
    }
    me->done = true;
    leave(*machine.cluster_group);
    // A block that has ended has no memory any more, whatever its cluster still reads there.
    if (--me->block->running == 0) std::fill(me->block->memory.begin(), me->block->memory.end(), uint8_t(0xff));
    machine.steps++;
    swapcontext(&me->context, &scheduler);
}

std::unique_ptr<Fiber> make_fiber(Block& block, int thread, int rank) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = &block;
    fiber->thread = thread;
    fiber->rank = rank;
    fiber->stack = std::make_unique<uint8_t[]>(STACK_BYTES);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter, 0);
    return fiber;
}

// The oldest copies of every thread that has left them to a barrier. False: there are none.
bool land(std::vector<std::unique_ptr<Fiber>>& fibers) {
    bool any = false;
    for (auto& fiber : fibers) {
        any |= !fiber->landings.empty();
        if (!fiber->landings.empty()) land_oldest(*fiber);
    }
    return any;
}

void run_fibers(std::vector<std::unique_ptr<Fiber>>& fibers) {
    // Every other round in reverse, so that what works only in one order of warps shows.
    for (bool reverse = false;; reverse = !reverse) {
        const long before = machine.steps;
        bool running = false;
        for (size_t i = 0; i < fibers.size(); i++) {
            Fiber& fiber = *fibers[reverse ? fibers.size() - 1 - i : i];
            if (fiber.done) continue;
            running = true;
            machine.current = &fiber;
            swapcontext(&scheduler, &fiber.context);
            if (failure) std::rethrow_exception(failure);
        }
        if (!running) return;
        if (machine.steps == before && !land(fibers)) throw std::runtime_error("deadlock: every thread waits");
    }
}

}  // namespace

Block::Block(Index index, int threads, size_t shared_bytes)
    : index(index),
      memory(shared_bytes + 1024, 0xff),  // all ones: a NaN in every float type, so that nobody counts on zeros
      warps((threads + LANES - 1) / LANES, Group(LANES)),
      warpgroups((threads + 4 * LANES - 1) / (4 * LANES), Group(4 * LANES)),
      all(threads),
      landed(memory.size() / 16),
      running(threads) {
    shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
}

void wait_until(const std::function<bool()>& ready) {
    Fiber* const me = machine.current;
    while (!ready()) swapcontext(&me->context, &scheduler);
    machine.steps++;
}

void land_oldest(Fiber& fiber) {
    auto& block = *fiber.block;
    block.landings++;
    for (const auto& copy : fiber.landings.front().copies) {
        if (!copy.done) std::memcpy(copy.to, copy.bytes, copy.size);
        block.landed.at((copy.to - block.shared) / 16) = block.landings;
    }
    fiber.landings.front().arrive();
    fiber.landings.pop_front();
}

void others_first() {
    // The second time: where this fiber came last in one round and comes first in the next, nobody has been on.
    int back = 0;
    wait_until([&] { return machine.steps++, back++ == 2; });
}

void meet(Group& group, int place, const char* operation, void* record, const std::function<void(void* const*)>& work) {
    if (group.arrived == 0) group.operation = operation;
    if (std::strcmp(group.operation, operation) != 0)
        throw std::runtime_error(std::string("threads that must do the same are at ") + group.operation + " and " +
                                 operation);
    group.records[place] = record;
    machine.steps++;
    if (++group.arrived == group.size) {
        work(group.records.data());
        group.arrived = 0;
        group.generation++;
    } else {
        const long mine = group.generation;
        wait_until([&] { return group.generation != mine; });
    }
}

void run(Index grid, int threads, size_t shared_bytes, Index cluster, const std::function<void()>& body) {
    if (grid.x % cluster.x || grid.y % cluster.y) throw std::runtime_error("the grid is no multiple of the cluster");
    if (threads % LANES) throw std::runtime_error("a block of part of a warp is not emulated");
    if (shared_bytes > 227 * 1024) throw std::runtime_error("more shared memory than a block can have");
    kernel_body = &body;
    failure = nullptr;
    const int blocks = cluster.x * cluster.y;
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y += cluster.y)
            for (int x = 0; x < grid.x; x += cluster.x) {
                machine.cluster.clear();
                machine.tiles.clear();
                machine.cluster_group = std::make_unique<Group>(threads * blocks);
                std::vector<std::unique_ptr<Fiber>> fibers;
                machine.fibers.clear();
                for (int rank = 0; rank < blocks; rank++) {
                    const Index index{x + rank % cluster.x, y + rank / cluster.x, z};
                    machine.cluster.push_back(std::make_unique<Block>(index, threads, shared_bytes));
                    for (int thread = 0; thread < threads; thread++) {
                        fibers.push_back(make_fiber(*machine.cluster.back(), thread, rank));
                        machine.fibers.push_back(fibers.back().get());
                    }
                }
                run_fibers(fibers);
                if (!machine.tiles.empty()) throw std::runtime_error("a block ended before its tiles had come");
            }
    machine.current = nullptr;
}

}  // namespace llmkern::cuda::emulated
