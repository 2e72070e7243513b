#include "cpu/simd/baseline.h"

#include "cpu/gptq_block/kernel.inl"
