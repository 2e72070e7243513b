#include "cpu/simd/neon_dotprod.h"

#include "cpu/linear/dot_neon_dotprod.h"

#include "cpu/int4_linear/kernel.inl"
