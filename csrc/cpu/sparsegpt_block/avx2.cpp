#include "cpu/simd/avx2.h"

#include "cpu/sparsegpt_block/kernel.inl"
