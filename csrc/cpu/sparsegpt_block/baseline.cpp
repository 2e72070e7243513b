#include "cpu/simd/baseline.h"

#include "cpu/sparsegpt_block/kernel.inl"
