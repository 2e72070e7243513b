#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace llmkern {
namespace {

using Clock = std::chrono::steady_clock;

// A worker that finds no job looks for the next one before it sleeps: for SPIN without a break, then up to WATCH with
// its core on offer to anyone between two looks. The layers of a model call up to some hundred microseconds apart.
constexpr auto SPIN = std::chrono::microseconds(20);
constexpr auto WATCH = std::chrono::milliseconds(2);
// An offer that was taken for so long went to a thread that does not give the core back, such as the spinning worker of
// another pool. Only a wake-up gets it back then, so for CONTENDED the worker sleeps at once and watches no more.
constexpr auto TAKEN = std::chrono::microseconds(500);
constexpr auto CONTENDED = std::chrono::milliseconds(50);
// The OpenMP team that torch has started takes a job over where its spinning worker holds the core of ours. Its barrier
// waits for every member, so after one that came so much later than the caller was done, a neighbour is to blame, and
// the team is left alone: first for LEFT_ALONE, then for twice as long each time, up to LEFT_ALONE_MOST.
constexpr auto LATE = std::chrono::milliseconds(1);
constexpr auto LEFT_ALONE = std::chrono::milliseconds(200);
constexpr auto LEFT_ALONE_MOST = std::chrono::seconds(5);
// What it costs the caller to wake sleepers (50 to 100 us measured on virtual machines). They are left asleep until
// what they could have saved adds up to that, in this job and those before it.
constexpr auto WAKE = std::chrono::microseconds(60);
// Chunks per thread: enough that a thread whose core is taken away leaves little behind.
constexpr int CHUNKS_PER_THREAD = 8;
// With fewer chunks than this the first one, which tells how long a job takes, would be most of the job.
constexpr int64_t MEASURABLE = 6;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// The state of the current job in one word, so that a chunk can be taken only from the job it belongs to:
//   bits 32..63 job number | bits 20..31 how many workers may help | bits 0..19 chunks not yet taken
constexpr uint64_t pack(uint64_t job, uint64_t helpers, uint64_t left) { return job << 32 | helpers << 20 | left; }
constexpr uint64_t job_of(uint64_t state) { return state >> 32; }
constexpr int helpers_of(uint64_t state) { return static_cast<int>(state >> 20 & 0xfff); }
constexpr int64_t left_of(uint64_t state) { return static_cast<int64_t>(state & 0xfffff); }
constexpr int MAX_THREADS = 0xfff;

// libgomp's function for `#pragma omp parallel`, if the process has loaded it: not linked, so that nothing needs it.
using TeamFunction = void (*)(void (*run)(void*), void* context, unsigned threads, unsigned flags);
TeamFunction find_team() { return reinterpret_cast<TeamFunction>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

class Pool {
  public:
    // team: null in a forked child, where a team that the parent started would hang. Until `contended_until` the cores
    // of workers count as held by others.
    explicit Pool(TeamFunction team, Clock::time_point contended_until = {})
        : team_(team), contended_until_(contended_until.time_since_epoch().count()) {}

    // False if another thread has the workers.
    bool run(int64_t tasks, int threads, void (*run)(void*, int64_t, int64_t), void* context) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner) return false;
        const bool team = takes_team();
        if (!team) threads = 1 + grow(threads - 1);
        tasks_ = tasks;
        chunks_ = std::min<int64_t>(tasks, int64_t{threads} * CHUNKS_PER_THREAD);
        run_ = run;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t helpers = team ? 0 : static_cast<uint64_t>(threads - 1);
        state_.store(pack(job_of(state_.load(std::memory_order_relaxed)) + 1, helpers, static_cast<uint64_t>(chunks_)));
        if (team) {
            run_team(threads);
            return true;
        }
        const auto start = Clock::now();
        bool woken = chunks_ < MEASURABLE && wake();
        work(state_.load(std::memory_order_relaxed), [&](int64_t left) {
            if (woken || asleep_.load() == 0) return;
            const auto spent = Clock::now() - start;
            if (left == 0)
                missed_ += spent - spent / threads;
            else if (const auto rest = spent / (chunks_ - left) * left; missed_ + rest - rest / threads > WAKE)
                woken = wake();
        });
        // Only chunks that a worker took are still open. Its core may be taken away: then give ours up too.
        for (int spins = 0; done_.load(std::memory_order_acquire) != chunks_; ++spins) {
            if (spins < 4096)
                pause();
            else
                std::this_thread::yield();
        }
        return true;
    }

  private:
    bool takes_team() {
        const auto now = Clock::now();
        return team_ && now.time_since_epoch().count() < contended_until_.load(std::memory_order_relaxed) &&
               now >= left_alone_until_;
    }

    // The job just published, by torch's team.
    void run_team(int threads) {
        struct Job {
            Pool* pool;
            uint64_t state;
            std::thread::id caller;
            Clock::time_point done;
        };
        const auto start = Clock::now();
        Job job{this, state_.load(std::memory_order_relaxed), std::this_thread::get_id(), {}};
        team_(
            [](void* context) {
                Job& mine = *static_cast<Job*>(context);
                mine.pool->work(mine.state, [](int64_t) {});
                if (std::this_thread::get_id() == mine.caller) mine.done = Clock::now();
            },
            &job, static_cast<unsigned>(threads), 0);
        // Its members end within the time of one chunk of each other.
        const auto now = Clock::now();
        const auto chunk = (job.done - start) * threads / chunks_;
        if (now - job.done > LATE + chunk) {
            left_alone_until_ = now + left_alone_;
            left_alone_ = std::min<Clock::duration>(2 * left_alone_, LEFT_ALONE_MOST);
        } else {
            left_alone_ = LEFT_ALONE;
            contended_until_.store((now + CONTENDED).time_since_epoch().count(), std::memory_order_relaxed);
        }
    }

    // Starts workers up to `wanted`; returns how many of those there are.
    int grow(int wanted) {
        sigset_t all, before;
        if (started_ < wanted) {
            sigfillset(&all);  // signals belong to the threads of the program
            pthread_sigmask(SIG_SETMASK, &all, &before);
            try {
                for (; started_ < wanted; ++started_) std::thread(&Pool::loop, this, started_).detach();
            } catch (const std::system_error&) {
                // No more threads to be had: the work is done by those there are.
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
        return std::min(started_, wanted);
    }

    bool wake() {
        if (asleep_.load() == 0) return false;
        {
            std::lock_guard<std::mutex> lock(sleep_);
        }
        wake_.notify_all();
        missed_ = {};
        return true;
    }

    // Takes chunks of the job of `state` until none is left; calls after(chunks left) after each.
    template <class After>
    void work(uint64_t state, After after) {
        const uint64_t job = job_of(state);
        while (job_of(state) == job && left_of(state) > 0) {
            if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel)) continue;
            // The job cannot end before this chunk is done, so its fields are stable.
            const int64_t chunk = chunks_ - left_of(state);
            run_(context_, tasks_ * chunk / chunks_, tasks_ * (chunk + 1) / chunks_);
            done_.fetch_add(1, std::memory_order_release);
            state = state_.load(std::memory_order_acquire);
            if (job_of(state) == job) after(left_of(state));
        }
    }

    bool is_news(uint64_t state, uint64_t seen) const { return job_of(state) != seen && left_of(state) > 0; }

    // Looks for a job after `seen`; the last state it saw.
    uint64_t watch(uint64_t seen) {
        const auto start = Clock::now();
        const bool contended = start.time_since_epoch().count() < contended_until_.load(std::memory_order_relaxed);
        const auto until = contended ? start + SPIN : start + WATCH;
        uint64_t state = state_.load(std::memory_order_acquire);
        for (auto now = start; !is_news(state, seen) && now < until;) {
            if (now < start + SPIN) {
                for (int i = 0; i < 16; ++i) pause();
                now = Clock::now();
            } else {
                std::this_thread::yield();
                const auto back = Clock::now();
                if (back - now > TAKEN) {
                    contended_until_.store((back + CONTENDED).time_since_epoch().count(), std::memory_order_relaxed);
                    return state_.load(std::memory_order_acquire);
                }
                now = back;
            }
            state = state_.load(std::memory_order_acquire);
        }
        return state;
    }

    void loop(int index) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t state = watch(seen);
            if (!is_news(state, seen)) {
                std::unique_lock<std::mutex> lock(sleep_);
                asleep_.fetch_add(1);
                wake_.wait(lock, [&] { return is_news(state = state_.load(), seen); });
                asleep_.fetch_sub(1);
            }
            seen = job_of(state);
            if (index < helpers_of(state)) work(state, [](int64_t) {});
        }
    }

    std::mutex owner_;  // held by the thread whose job this is
    int started_ = 0;
    Clock::duration missed_{};  // by leaving sleepers asleep
    const TeamFunction team_;
    Clock::time_point left_alone_until_{};
    Clock::duration left_alone_ = LEFT_ALONE;
    std::atomic<Clock::rep> contended_until_;

    alignas(64) std::atomic<uint64_t> state_{0};
    int64_t tasks_ = 0, chunks_ = 0;
    void (*run_)(void*, int64_t, int64_t) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<int64_t> done_{0};

    alignas(64) std::atomic<int> asleep_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

// Never destroyed: workers may still look at it when the process ends, and a child's parent's pool has no threads.
std::atomic<Pool*> pool{nullptr};

Pool& current_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool(find_team());
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool(nullptr); });
    });
    return *pool.load(std::memory_order_acquire);
}

}  // namespace

void parallel_ranges(int64_t tasks, int threads, void (*run)(void*, int64_t, int64_t), void* context) {
    static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    threads = static_cast<int>(std::min<int64_t>({threads, cores, MAX_THREADS, tasks}));
    if (threads <= 1 || !current_pool().run(tasks, threads, run, context)) run(context, 0, tasks);
}

}  // namespace llmkern
