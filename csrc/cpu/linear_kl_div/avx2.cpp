#include "cpu/simd/avx2.h"

#include "cpu/linear_kl_div/kernel.inl"
