#include "cpu/sparse/avx512_bf16.h"

#include "cpu/bitmask_linear/kernel.inl"
