#include "cuda/columns/launch_columns.h"

namespace llmkern::cuda {

template void launch_columns<Prune::GROUPS, false>(const char*, ColumnArgs, const ColumnPlan&, void*);
template void launch_columns<Prune::GROUPS, true>(const char*, ColumnArgs, const ColumnPlan&, void*);

}  // namespace llmkern::cuda
