#include "cpu/simd/avx2.h"

#include "cpu/gptq_block/kernel.inl"
