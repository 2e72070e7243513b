#include "cpu/simd/avx512_bf16.h"

#include "cpu/linear/dot_avx512_vnni.h"

#include "cpu/int4_linear/kernel.inl"
