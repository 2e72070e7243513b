// The pool of csrc/common/parallel.cpp under the thread sanitizer (tools/sanitize.sh): every task runs once, whoever
// calls, and however many threads are asked for. Exits with 0, or says what is wrong.
//
// Includes the source itself: its Pool takes more threads than the machine has cores, which parallel_for does not.
#include "common/parallel.cpp"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using llmkern::Pool;

struct Job {
    std::vector<int> runs;  // of each task; not atomic on purpose: two runs of one task are a race
};

void run(void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++static_cast<Job*>(context)->runs[static_cast<size_t>(i)];
}

void check(const Job& job, const char* what) {
    for (size_t i = 0; i < job.runs.size(); ++i)
        if (job.runs[i] != 1) {
            std::fprintf(stderr, "pool: %s: task %zu of %zu ran %d times\n", what, i, job.runs.size(), job.runs[i]);
            std::exit(1);
        }
}

void call(Pool& pool, int64_t tasks, int threads, const char* what) {
    Job job{std::vector<int>(static_cast<size_t>(tasks))};
    if (!pool.run(tasks, threads, run, &job)) run(&job, 0, tasks);
    check(job, what);
}

void calls_of_every_size(Pool& pool) {
    for (int round = 0; round < 40; ++round)
        for (int threads : {2, 3, 8})
            for (int64_t tasks : {1, 2, 7, 63, 64, 65, 1000}) call(pool, tasks, threads, "one caller");
}

void several_callers(Pool& pool) {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&pool] {
            for (int round = 0; round < 200; ++round) call(pool, 100 + round, 2 + round % 3, "several callers");
        });
    for (std::thread& caller : callers) caller.join();
}

void after_sleep(Pool& pool) {
    for (int round = 0; round < 20; ++round) {
        std::this_thread::sleep_for(10 * llmkern::SPIN);
        call(pool, 50, 4, "after sleep");
    }
}

// In the place of libgomp's team, which the thread sanitizer does not know: threads that all run the function.
void team(void (*run)(void*), void* context, unsigned threads, unsigned) {
    std::vector<std::thread> members;
    for (unsigned i = 1; i < threads; ++i) members.emplace_back(run, context);
    run(context);
    for (std::thread& member : members) member.join();
}

}  // namespace

int main() {
    Pool& with_team = *new Pool(team, llmkern::Clock::now() + std::chrono::hours(1));
    calls_of_every_size(with_team);
    several_callers(with_team);

    Pool& pool = *new Pool(nullptr);
    calls_of_every_size(pool);
    several_callers(pool);
    after_sleep(pool);
    std::puts("pool: every task ran once");
}
