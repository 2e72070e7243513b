#include "cpu/sparse/neon_dotprod.h"

#include "cpu/bitmask_linear/kernel.inl"
