#include "cpu/simd/neon_i8mm.h"

#include "cpu/linear/dot_neon_i8mm.h"

#include "cpu/int4_linear/kernel.inl"
