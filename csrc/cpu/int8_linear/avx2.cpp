#include "cpu/simd/avx2.h"

#include "cpu/int8_linear/kernel.inl"
