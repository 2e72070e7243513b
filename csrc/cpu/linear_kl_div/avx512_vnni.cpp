#include "cpu/simd/avx512_vnni.h"

#include "cpu/linear_kl_div/kernel.inl"
