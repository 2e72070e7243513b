#include "cpu/simd/avx512_vnni.h"

#include "cpu/gptq_block/kernel.inl"
