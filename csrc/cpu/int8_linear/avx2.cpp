#include "cpu/simd/avx2.h"

#include "cpu/linear/codes_avx2.h"

#include "cpu/int8_linear/kernel.inl"
