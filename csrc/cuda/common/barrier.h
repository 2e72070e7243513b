// sm_90: what lets the warps of a block do different things: barriers in shared memory, which some threads arrive at
// and others wait for (PTX ISA, "mbarrier"), barriers of a part of the block, and registers that move from one
// warpgroup to another. The order of a use:
//
//   barrier_init(b, arrivals) by one thread; sync_block()
//   barrier_arrive(b)        whatever the thread has written is there for those whose wait ends by it
//   barrier_wait(b, parity)  until phase `parity` is over: a phase is `arrivals` arrivals, the first one's parity is 0.
//                            With parity 1 the wait on a fresh barrier is over at once, as if a phase had gone before.
//
// What wgmma shall read and ordinary instructions (cp.async among them) have written needs fence_async(): by the thread
// that wrote it before it arrives, or by those that multiply after they have waited. A thread whose copies are under
// way leaves it to the others: a fence may wait for them.
#pragma once

#include "cuda/common/instructions.h"

namespace llmkern::cuda {

struct alignas(8) Barrier {
    uint64_t state;
};

LLMKERN_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

LLMKERN_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

// Without a branch, of which the compiler has none between products of a warpgroup that are to be under way together.
LLMKERN_DEVICE void barrier_arrive_if(bool here, Barrier* barrier) {
    asm volatile(
        "{\n.reg .pred here;\n"
        "setp.ne.u32 here, %1, 0;\n"
        "@here mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(shared_address(barrier)),
        "r"(uint32_t(here))
        : "memory");
}

// As barrier_arrive by this thread, as soon as all copies that it has asked for have landed.
LLMKERN_DEVICE void copy_async_arrive(Barrier* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

LLMKERN_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// As sync_block, for THREADS threads that name the same ID (1 to 15; 0 is sync_block's), whole warps.
template <int ID, int THREADS>
LLMKERN_DEVICE void sync_threads() {
    static_assert(0 < ID && ID < 16 && THREADS % 32 == 0, "");
    asm volatile("bar.sync %0, %1;\n" ::"n"(ID), "n"(THREADS) : "memory");
}

// From here on the threads of this warpgroup have COUNT registers each, fewer or more than the kernel started with: all
// of a block's together no more than at its start. Needs __launch_bounds__(threads, 1), and sm_90a.
template <int COUNT>
LLMKERN_DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
template <int COUNT>
LLMKERN_DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

}  // namespace llmkern::cuda
