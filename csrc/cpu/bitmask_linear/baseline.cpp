#include "cpu/sparse/baseline.h"

#include "cpu/bitmask_linear/kernel.inl"
