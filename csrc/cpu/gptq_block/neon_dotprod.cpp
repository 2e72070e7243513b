#include "cpu/simd/neon_dotprod.h"

#include "cpu/gptq_block/kernel.inl"
