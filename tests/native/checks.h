// The parts of the native tests; levels.cpp runs them.
#pragma once

#include "array.h"

namespace checks {

// Whether the machine has the level of this name.
bool runs_here(const char* level);

void check_linear_ops();
void check_solver_ops();
void check_losses();
void check_peaks();

}  // namespace checks
