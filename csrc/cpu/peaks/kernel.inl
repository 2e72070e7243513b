// A level's file defines LLMKERN_NS and includes this after its own loops, in an anonymous namespace of that namespace:
// int64_t fp32(int64_t rounds), bf16 and int8: the operations done in `rounds` rounds, 0 where there is no instruction.
// CHAINS independent sums hide the latency of an instruction (4 cycles or 5, two of them at a time).
#include "common/parallel.h"
#include "cpu/peaks/peaks.h"

namespace llmkern::LLMKERN_NS {
namespace {

constexpr int64_t TASKS_PER_THREAD = 16;  // small enough that a thread that is held up leaves little to wait for

typedef uint64_t Block __attribute__((vector_size(64), aligned(64)));

// A reader's result must be used, or the compiler leaves the reading out.
volatile uint64_t used;

template <int STREAMS>
void read_range(const char* data, int64_t bytes, int64_t ahead) {
    constexpr int64_t STEP = 4 * sizeof(Block);
    const int64_t length = bytes / STREAMS / STEP * STEP;
    Block sum[STREAMS] = {};
    for (int64_t at = 0; at < length; at += STEP) {
        for (int stream = 0; stream < STREAMS; ++stream) {
            const char* from = data + stream * length + at;
            if (ahead)
                for (int64_t line = 0; line < STEP; line += 64) __builtin_prefetch(from + ahead + line);
            const Block* block = reinterpret_cast<const Block*>(from);
            sum[stream] |= (block[0] | block[1]) | (block[2] | block[3]);
        }
    }
    for (int stream = 0; stream < STREAMS; ++stream)
        for (int lane = 0; lane < 8; ++lane) used = sum[stream][lane];
}

}  // namespace

double multiply_add(Factors factors, int64_t rounds, int threads) {
    const auto run = factors == Factors::FP32 ? fp32 : factors == Factors::BF16 ? bf16 : int8;
    const int64_t tasks = TASKS_PER_THREAD * threads, each = rounds / TASKS_PER_THREAD + 1;
    parallel_for(tasks, threads, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) run(each);
    });
    return static_cast<double>(run(1)) * static_cast<double>(each) * static_cast<double>(tasks);
}

void read(const void* data, int64_t bytes, int64_t streams, int64_t ahead, int threads) {
    const int64_t pieces = TASKS_PER_THREAD * threads, piece = bytes / pieces / 4096 * 4096;
    parallel_for(pieces, threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
            const char* from = static_cast<const char*>(data) + at * piece;
            streams == 1 ? read_range<1>(from, piece, ahead) : read_range<4>(from, piece, ahead);
        }
    });
}

}  // namespace llmkern::LLMKERN_NS
