// The solvers' ops at every level of this machine. A choice feeds all choices after it, so each is judged by double
// precision on the kernel's own choices before it: fp32 may decide a near tie either way, and nothing else.
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/gptq_block/gptq_block.h"
#include "cpu/scale_search/scale_search.h"
#include "cpu/sparsegpt_block/sparsegpt_block.h"

namespace checks {
namespace {

using namespace llmkern;

struct BlockCase {
    int64_t n, b, group_size;  // group_size 0: not quantized
    int bits;
    bool zeros, mask;
    int prune_n, prune_m;
};

const BlockCase BLOCKS[] = {
    {1, 1, 1, 4, false, false, 0, 0},   {7, 13, 5, 4, true, false, 0, 0},    {33, 64, 16, 4, false, true, 0, 0},
    {17, 128, 1, 8, true, false, 0, 0}, {40, 128, 128, 3, true, true, 0, 0}, {9, 40, 0, 0, false, true, 0, 0},
    {21, 64, 0, 0, false, false, 2, 4}, {8, 128, 32, 4, true, false, 2, 4},  {19, 48, 16, 4, false, false, 4, 8},
    {5, 30, 0, 0, false, false, 1, 3},
};

struct Block {
    BlockCase shape;
    std::unique_ptr<Array> w, wc, v, diagonal, scales, zeros, mask;
    Array group;
    int64_t groups;

    Block(const BlockCase& c, Random& random)
        : shape(c),
          w(random_array(DType::F32, c.n * c.b, random)),
          wc(random_array(DType::F32, c.n * c.b, random, 0.2)),
          v(random_array(DType::F32, c.b * c.b, random, 0.1)),
          diagonal(random_array(DType::F32, c.b, random)),
          mask(std::make_unique<Array>(DType::I8, c.n * c.b)),
          group(DType::F32, c.b),
          groups(c.group_size ? (c.b + c.group_size - 1) / c.group_size : 0) {
        for (int64_t i = 0; i < c.n * c.b; ++i) {
            wc->set(i, w->get(i) + wc->get(i));
            mask->set(i, static_cast<double>(random.below(2)));
        }
        for (int64_t i = 0; i < c.b; ++i) {
            diagonal->set(i, 0.5 + std::fabs(diagonal->get(i)));
            for (int64_t j = 0; j <= i; ++j) v->set(i * c.b + j, i == j);
            group.data<int32_t>()[i] = static_cast<int32_t>(c.group_size ? i / c.group_size : 0);
        }
        scales = std::make_unique<Array>(DType::F32, c.n * groups);
        zeros = std::make_unique<Array>(DType::I8, c.n * groups);
        for (int64_t i = 0; i < c.n * groups; ++i) {
            scales->set(i, (0.5 + random.uniform()) * 4 / (1 << c.bits));
            zeros->set(i, static_cast<double>(random.below(5) - 2));
        }
    }

    ColumnArgs args(bool* keep, float* q) const {
        ColumnArgs a{};
        a.w = w->data<float>(), a.wc = wc->data<float>(), a.v = v->data<float>();
        a.diagonal = shape.prune_m ? diagonal->data<float>() : nullptr;
        a.mask = shape.mask ? mask->data<bool>() : nullptr;
        a.scales = groups ? scales->data<float>() : nullptr;
        a.zeros = groups && shape.zeros ? zeros->data<int8_t>() : nullptr;
        a.group = groups ? group.data<int32_t>() : nullptr;
        a.q = q, a.keep = keep, a.n = shape.n, a.b = shape.b, a.groups = groups;
        a.prune_n = shape.prune_n, a.prune_m = shape.prune_m, a.bits = shape.bits, a.threads = 2;
        return a;
    }
};

// Whether q is what the compensated value `x` of row n, column j becomes, if it is kept.
bool is_choice(const Block& block, int64_t n, int64_t j, double x, double slack, double q) {
    if (!block.shape.bits) return std::fabs(q - x) <= slack;
    const int64_t at = n * block.groups + j / block.shape.group_size;
    const double scale = block.scales->get(at), zero = block.shape.zeros ? block.zeros->get(at) : 0;
    const double half = 1 << (block.shape.bits - 1), code = std::nearbyint(q / scale) + zero;
    if (std::fabs((code - zero) * scale - q) > 1e-6 * scale * half || code < -half || code > half - 1) return false;
    const double miss = x - q, limit = 0.5 * scale + slack;
    return std::fabs(miss) <= limit || (code == -half && miss < 0) || (code == half - 1 && miss > 0);
}

// Whether the n:m choice in the columns from j on takes the columns of the least scores.
bool is_least(const Block& block, const Array& keep, int64_t n, int64_t j, const std::vector<double>& feedback) {
    const int m = block.shape.prune_m;
    const int64_t b = block.shape.b;
    std::vector<double> move(static_cast<size_t>(m));
    double most_pruned = 0, least_kept = INFINITY;
    int pruned = 0;
    for (int k = 0; k < m; ++k) {
        const int64_t at = n * b + j + k;
        double moved = block.wc->get(at) - block.w->get(at) + feedback[static_cast<size_t>(j + k)];
        for (int i = 0; i < k; ++i) moved -= move[static_cast<size_t>(i)] * block.v->get((j + i) * b + j + k);
        move[static_cast<size_t>(k)] = moved;
        const double root = (block.w->get(at) + moved) * block.diagonal->get(j + k);
        if (keep.get(at) == 0) {
            most_pruned = std::fmax(most_pruned, root * root);
            ++pruned;
        } else {
            least_kept = std::fmin(least_kept, root * root);
        }
    }
    return pruned == block.shape.prune_n && most_pruned <= least_kept * (1 + 1e-4) + 1e-6;
}

void check_block(const Block& block, const std::string& what, const Array& q, const Array& keep) {
    const BlockCase& s = block.shape;
    int64_t wrong = 0;
    for (int64_t n = 0; n < s.n; ++n) {
        std::vector<double> feedback(static_cast<size_t>(s.b));
        for (int64_t j = 0; j < s.b; ++j) {
            if (s.prune_m && j % s.prune_m == 0) wrong += !is_least(block, keep, n, j, feedback);
            const int64_t at = n * s.b + j;
            const double x = block.wc->get(at) + feedback[static_cast<size_t>(j)], mine = q.get(at);
            const double slack = 1e-5 * (1 + std::fabs(x));
            const bool kept = s.prune_m ? keep.get(at) != 0 : !s.mask || block.mask->get(at) != 0;
            wrong += kept ? !is_choice(block, n, j, x, slack, mine) : mine != 0;
            wrong += kept != (keep.get(at) != 0);
            for (int64_t i = j + 1; i < s.b; ++i)
                feedback[static_cast<size_t>(i)] += (block.w->get(at) - mine) * block.v->get(j * s.b + i);
        }
    }
    check(wrong == 0, "%s, %ld x %ld, groups of %ld, %d bits, mask %d, %d of %d: %ld choices are wrong", what.c_str(),
          s.n, s.b, s.group_size, s.bits, s.mask, s.prune_n, s.prune_m, wrong);
}

void run_block(const Block& block, bool gptq, const char* level, void (*run)(const ColumnArgs&)) {
    if (!runs_here(level)) return;
    Array q(DType::F32, block.shape.n * block.shape.b), keep(DType::I8, block.shape.n * block.shape.b);
    q.fill(0xff);
    keep.fill(0x7f);
    run(block.args(gptq ? nullptr : keep.data<bool>(), q.data<float>()));
    if (gptq)  // it says nothing about what is kept: as the mask has it
        for (int64_t i = 0; i < keep.count(); ++i) keep.set(i, !block.shape.mask || block.mask->get(i) != 0);
    check_block(block, std::string(gptq ? "gptq_block on " : "sparsegpt_block on ") + level, q, keep);
}

struct SearchCase {
    int64_t n, k, group_size;
    int bits;
    bool symmetric;
    int steps;
};

const SearchCase SEARCHES[] = {
    {1, 1, 1, 4, true, 1},     {3, 13, 5, 4, false, 7},    {9, 75, 32, 8, true, 20},
    {5, 96, 96, 3, false, 33}, {17, 260, 100, 4, true, 5}, {6, 64, 1, 4, false, 16},
};

// The error of a scale and zero point, weighted.
double error_of(const Array& w, const Array& importance, int64_t row, int64_t k0, int64_t k1, int64_t k, double half,
                double scale, double zero) {
    double sum = 0;
    for (int64_t i = k0; i < k1; ++i) {
        const double x = w.get(row * k + i);
        const double code = std::fmin(std::fmax(std::nearbyint(x / scale) + zero, -half), half - 1);
        const double miss = (code - zero) * scale - x;
        sum += miss * miss * importance.get(i);
    }
    return sum;
}

void run_search(const SearchCase& s, const Array& w, const Array& importance, const char* level,
                void (*run)(const ScaleSearchArgs&)) {
    if (!runs_here(level)) return;
    const int64_t groups = (s.k + s.group_size - 1) / s.group_size;
    const double smallest = 0.4, half = 1 << (s.bits - 1), top = (1 << s.bits) - 1;
    Array scales(DType::F32, s.n * groups), zeros(DType::I8, s.n * groups);
    scales.fill(0xff);
    zeros.fill(0x7f);
    run({w.data<float>(), importance.data<float>(), scales.data<float>(), zeros.data<int8_t>(), s.n, s.k, s.group_size,
         s.bits, s.symmetric, s.steps, smallest, 2});
    int64_t wrong = 0;
    for (int64_t row = 0; row < s.n; ++row)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t k0 = g * s.group_size, k1 = k0 + s.group_size < s.k ? k0 + s.group_size : s.k;
            double low = 0, high = 0;
            for (int64_t k = k0; k < k1; ++k) {
                low = std::fmin(low, w.get(row * s.k + k));
                high = std::fmax(high, w.get(row * s.k + k));
            }
            if (s.symmetric) high = std::fmax(high, -low), low = -high;
            const double mine = scales.get(row * groups + g), zero = zeros.get(row * groups + g);
            double best = INFINITY, nearest = INFINITY;
            for (int i = 0; i < s.steps; ++i) {
                const double ratio = 1 - i * (1 - smallest) / s.steps;
                const double scale = high > low ? (high - low) * ratio / top : 1;
                const double shift = s.symmetric ? 0 : std::nearbyint(-low * ratio / scale) - half;
                best = std::fmin(best, error_of(w, importance, row, k0, k1, s.k, half, scale, shift));
                nearest = std::fmin(nearest, std::fabs(scale - mine));
            }
            const double error = error_of(w, importance, row, k0, k1, s.k, half, mine, zero);
            wrong += !(nearest <= 1e-6 * mine) || !(error <= best * (1 + 1e-4) + 1e-10);
        }
    check(wrong == 0, "scale_search on %s, %ld x %ld, groups of %ld, %d bits, symmetric %d: %ld groups are wrong",
          level, s.n, s.k, s.group_size, s.bits, s.symmetric, wrong);
}

}  // namespace

void check_solver_ops() {
    Random random(2);
    for (const BlockCase& shape : BLOCKS) {
        const Block block(shape, random);
        if (shape.bits && !shape.prune_m) {
#define LLMKERN_KERNEL(level) run_block(block, true, #level, level::gptq_block);
#include "cpu/gptq_block/kernels.def"
#undef LLMKERN_KERNEL
        }
        if (shape.mask || shape.prune_m) {
#define LLMKERN_KERNEL(level) run_block(block, false, #level, level::sparsegpt_block);
#include "cpu/sparsegpt_block/kernels.def"
#undef LLMKERN_KERNEL
        }
    }
    for (const SearchCase& shape : SEARCHES) {
        const auto w = random_array(DType::F32, shape.n * shape.k, random);
        const auto importance = random_array(DType::F32, shape.k, random);
        for (int64_t i = 0; i < shape.k; ++i) importance->set(i, importance->get(i) * importance->get(i));
#define LLMKERN_KERNEL(level) run_search(shape, *w, *importance, #level, level::scale_search);
#include "cpu/scale_search/kernels.def"
#undef LLMKERN_KERNEL
    }
}

}  // namespace checks
