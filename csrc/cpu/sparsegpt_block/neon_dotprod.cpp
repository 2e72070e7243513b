#include "cpu/simd/neon_dotprod.h"

#include "cpu/sparsegpt_block/kernel.inl"
