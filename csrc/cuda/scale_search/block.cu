// A warp per row and group. Lanes are clip ratios, a weight is read by all of them at once from shared memory: any
// group size works without a remainder, and only the best is found over lanes. A weight and ratio take seven
// instructions.
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/common/instructions.h"
#include "cuda/common/launch.h"
#include "cuda/common/values.h"
#include "cuda/scale_search/scale_search.h"

namespace llmkern::cuda::kernels::block {
namespace {

constexpr int WARPS = 8;
constexpr int PER_LANE = 2;   // ratios of a lane at a time
constexpr int COLUMNS = 128;  // of a group in shared memory at a time
constexpr int MAX_STEPS = 8192;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// 1.5 * 2^23: next to it a float has no room for fractions, so adding it rounds to an integer, ties to even.
constexpr float ROUNDER = 12582912.0f;

struct Candidate {
    float error, scale, zero;
    int index;
};

template <bool SYMMETRIC>
struct Search {
    const ScaleSearchArgs& a;
    const int lane = thread() % 32, warp = thread() / 32;
    float* const w = reinterpret_cast<float*>(shared_memory()) + warp * 2 * COLUMNS;
    float* const importance = w + COLUMNS;
    float* const ratios = reinterpret_cast<float*>(shared_memory()) + WARPS * 2 * COLUMNS;

    LLMKERN_DEVICE explicit Search(const ScaleSearchArgs& args) : a(args) {}

    // The grid of a ratio, in the arithmetic of the reference.
    LLMKERN_DEVICE Candidate candidate(int index, float low, float high) const {
        const float ratio = index < a.steps ? ratios[index] : 1.0f;
        float scale = divide(multiply(subtract(high, low), ratio), float((1 << a.bits) - 1));
        if (!(scale > 0)) scale = 1.0f;
        const float zero =
            SYMMETRIC ? 0.0f : subtract(round_even(divide(multiply(-low, ratio), scale)), float(1 << (a.bits - 1)));
        return {0.0f, scale, zero, index};
    }

    // Adds what `count` columns in shared memory contribute to the errors of the candidates.
    LLMKERN_DEVICE void add_errors(Candidate (&of)[PER_LANE], int count) const {
        const float half = float(1 << (a.bits - 1));
        float inverse[PER_LANE], low[PER_LANE], high[PER_LANE];
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) {
            inverse[c] = divide(1.0f, of[c].scale);
            low[c] = ROUNDER - half - of[c].zero;
            high[c] = ROUNDER + half - 1 - of[c].zero;
        }
        for (int i = 0; i < count; i += 4) {
            const Floats4 x = *reinterpret_cast<const Floats4*>(w + i);
            const Floats4 weight = *reinterpret_cast<const Floats4*>(importance + i);
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < PER_LANE; c++) {
                    const float rounded = multiply_add(x.f[j], inverse[c], ROUNDER);
                    const float code = subtract(minimum(maximum(rounded, low[c]), high[c]), ROUNDER);
                    const float miss = multiply_add(-code, of[c].scale, x.f[j]);
                    of[c].error = multiply_add(multiply(miss, miss), weight.f[j], of[c].error);
                }
        }
    }

    // The first of the least.
    LLMKERN_DEVICE static Candidate better(const Candidate& a, const Candidate& b) {
        return b.error < a.error || (b.error == a.error && b.index < a.index) ? b : a;
    }

    LLMKERN_DEVICE void run(int64_t row, int64_t group, int64_t groups) const {
        const int64_t start = group * a.group_size;
        const int64_t size = smaller<int64_t>(a.group_size, a.k - start);
        const float* const from = a.w + row * a.k + start;
        float low = 0, high = 0;
        for (int64_t i = lane; i < size; i += 32) {
            low = minimum(low, from[i]);
            high = maximum(high, from[i]);
        }
        for (int mask = 16; mask; mask /= 2) {
            low = minimum(low, shuffle_xor(low, mask));
            high = maximum(high, shuffle_xor(high, mask));
        }
        if (SYMMETRIC) {
            high = maximum(high, -low);
            low = -high;
        }
        Candidate best = candidate(0, low, high);
        if (a.steps > 1) best.error = INFINITE;
        for (int first = 0; first < a.steps && a.steps > 1; first += 32 * PER_LANE) {
            Candidate of[PER_LANE];
#pragma unroll
            for (int c = 0; c < PER_LANE; c++) of[c] = candidate(first + c * 32 + lane, low, high);
            for (int64_t done = 0; done < size; done += COLUMNS) {
                const int count = int(smaller<int64_t>(COLUMNS, size - done));
                sync_warp();  // nobody reads what was there before
                for (int i = lane; i < (count + 3) / 4 * 4; i += 32) {
                    w[i] = i < count ? from[done + i] : 0.0f;
                    importance[i] = i < count ? a.importance[start + done + i] : 0.0f;
                }
                sync_warp();
                add_errors(of, count);
            }
#pragma unroll
            for (int c = 0; c < PER_LANE; c++)
                if (of[c].index < a.steps) best = better(best, of[c]);
        }
        for (int mask = 16; mask; mask /= 2)
            best = better(best, {shuffle_xor(best.error, mask), shuffle_xor(best.scale, mask),
                                 shuffle_xor(best.zero, mask), shuffle_xor(best.index, mask)});
        if (lane == 0) {
            a.scales[row * groups + group] = best.scale;
            a.zeros[row * groups + group] = int8_t(best.zero);
        }
    }

    LLMKERN_DEVICE void run_all() const {
        for (int i = thread(); i < a.steps; i += WARPS * 32) ratios[i] = float(1 - i * (1 - a.smallest) / a.steps);
        sync_block();
        const int64_t groups = (a.k + a.group_size - 1) / a.group_size;
        for (int64_t at = int64_t(block_x()) * WARPS + warp; at < a.n * groups; at += int64_t(a.blocks) * WARPS)
            run(at / groups, at % groups, groups);
    }
};

template <bool SYMMETRIC>
__global__ void __launch_bounds__(WARPS * 32) search_kernel(ScaleSearchArgs args) {
    Search<SYMMETRIC>(args).run_all();
}

}  // namespace

void scale_search(const ScaleSearchArgs& args) {
    Grid grid;
    grid.x = unsigned(args.blocks);
    grid.threads = WARPS * 32;
    grid.shared_bytes = (WARPS * 2 * COLUMNS + size_t(args.steps)) * sizeof(float);
    constexpr const char* NAME = "scale_search: cuda.block";
    if (args.steps > MAX_STEPS)
        throw std::runtime_error(std::string(NAME) + ": too many steps: " + std::to_string(args.steps));
    launch(NAME, args.symmetric ? search_kernel<true> : search_kernel<false>, grid, args.stream, args);
}

}  // namespace llmkern::cuda::kernels::block
