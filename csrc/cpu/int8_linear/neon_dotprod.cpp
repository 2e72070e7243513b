#include "cpu/simd/neon_dotprod.h"

#include "cpu/int8_linear/kernel.inl"
