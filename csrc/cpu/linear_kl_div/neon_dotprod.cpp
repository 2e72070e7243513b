#include "cpu/simd/neon_dotprod.h"

#include "cpu/linear_kl_div/kernel.inl"
