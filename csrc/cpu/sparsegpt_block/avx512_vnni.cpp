#include "cpu/simd/avx512_vnni.h"

#include "cpu/sparsegpt_block/kernel.inl"
