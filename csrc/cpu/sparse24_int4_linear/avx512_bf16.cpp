#include "cpu/sparse/avx512_bf16.h"

#include "cpu/sparse24_int4_linear/kernel.inl"
