#include "cpu/simd/neon_i8mm.h"

#include "cpu/linear/dot_neon_i8mm.h"

#include "cpu/int8_dynamic_linear/kernel.inl"
