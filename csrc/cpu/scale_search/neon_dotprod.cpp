#include "cpu/simd/neon_dotprod.h"

#include "cpu/scale_search/kernel.inl"
