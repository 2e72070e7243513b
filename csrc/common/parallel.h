// The only threading code: parallel_for over independent tasks.
//
// Why a pool of our own and not OpenMP: a libgomp team hangs in a forked child, and its end-of-region barrier waits
// for every member, so that one busy core stalls a call for milliseconds. Here the caller hands out small chunks from
// one counter, works itself, and waits only for chunks that somebody took. A worker that is late finds nothing left
// and is not waited for. After a call workers watch for the next one for a while, then sleep (parallel.cpp).
//
// Where torch's team spins on the cores of our workers after its own work, that team runs our tasks: it is awake and
// has the core. A neighbour that makes its barrier wait ends that for a while.
//
// Fork: the child starts with an empty pool. Several calling threads: one has the workers, the others run alone.
#pragma once

#include <cstdint>

namespace llmkern {

// Calls run(context, begin, end) over [0, tasks) in disjoint ranges, on at most `threads` threads.
void parallel_ranges(int64_t tasks, int threads, void (*run)(void* context, int64_t begin, int64_t end), void* context);

// body(begin, end) over disjoint ranges of [0, tasks); it must not throw. threads <= 1 runs inline.
template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
    if (tasks <= 0) return;
    if (threads <= 1 || tasks == 1) {
        body(int64_t{0}, tasks);
        return;
    }
    parallel_ranges(
        tasks, threads, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
        &body);
}

}  // namespace llmkern
