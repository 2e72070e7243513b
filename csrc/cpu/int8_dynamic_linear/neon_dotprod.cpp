#include "cpu/simd/neon_dotprod.h"

#include "cpu/linear/dot_neon_dotprod.h"

#include "cpu/int8_dynamic_linear/kernel.inl"
