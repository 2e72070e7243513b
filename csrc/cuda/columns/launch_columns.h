// From an op's arguments to one of the instances of columns_kernel. The Python side (ops/_columns.py `column_plan`)
// chooses the sizes and has checked the tensors. For the files that compile instances.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/columns/columns.h"
#include "cuda/columns/kernel.h"
#include "cuda/common/launch.h"

namespace llmkern::cuda {

template <int COLUMNS, int LANES, int ROWS, Prune PRUNE, bool QUANTIZED>
void launch_instance(const char* name, const ColumnArgs& args, const ColumnPlan& plan, void* stream) {
    if (args.b > COLUMNS || plan.warps < 1 || plan.warps > COLUMN_WARPS)
        throw std::runtime_error(std::string(name) + ": at most " + std::to_string(COLUMNS) + " columns and " +
                                 std::to_string(COLUMN_WARPS) + " warps, got " + std::to_string(args.b) + " and " +
                                 std::to_string(plan.warps));
    if (args.layers > MAX_LAYERS)
        throw std::runtime_error(std::string(name) + ": at most " + std::to_string(MAX_LAYERS) + " layers, got " +
                                 std::to_string(args.layers));
    const int rows = plan.warps * (32 / LANES) * ROWS;
    Grid grid;
    grid.x = unsigned((args.n + rows - 1) / rows);
    grid.y = unsigned(args.layers);
    grid.threads = plan.warps * 32;
    grid.shared_bytes = column_scratch(COLUMNS, PRUNE, rows) * sizeof(float);
    launch(name, columns_kernel<COLUMNS, LANES, ROWS, PRUNE, QUANTIZED>, grid, stream, args, plan.warps);
}

template <Prune PRUNE, bool QUANTIZED>
void launch_columns(const char* name, ColumnArgs args, const ColumnPlan& plan, void* stream) {
    const auto at = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    args.aligned = args.b % 4 == 0 && at(args.w, 16) && at(args.wc, 16) && at(args.v, 16) && at(args.q, 16) &&
                   at(args.mask, 4) && at(args.keep, 4);
#define LLMKERN_COLUMNS(columns, lanes_, rows_)     \
    if (plan.lanes == lanes_ && plan.rows == rows_) \
    return launch_instance<columns, lanes_, rows_, PRUNE, QUANTIZED>(name, args, plan, stream)
    LLMKERN_COLUMNS(MAX_COLUMNS, 4, 1);
    if constexpr (PRUNE != Prune::GROUPS) {
        LLMKERN_COLUMNS(4, 1, 1);
        LLMKERN_COLUMNS(MAX_COLUMNS, 8, 1);
        LLMKERN_COLUMNS(MAX_COLUMNS, 4, 2);
        LLMKERN_COLUMNS(MAX_COLUMNS, 2, 2);
    }
#undef LLMKERN_COLUMNS
    throw std::runtime_error(std::string(name) + ": no instance for " + std::to_string(plan.lanes) +
                             " lanes per row and " + std::to_string(plan.rows) + " rows per lane");
}

}  // namespace llmkern::cuda
