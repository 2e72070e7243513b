#include "cpu/simd/avx512_bf16.h"

#include "cpu/int8_linear/kernel.inl"
