#include "cpu/sparse/avx2.h"

#include "cpu/bitmask_linear/kernel.inl"
