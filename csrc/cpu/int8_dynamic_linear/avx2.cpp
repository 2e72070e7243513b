#include "cpu/simd/avx2.h"

#include "cpu/linear/dot_avx2.h"

#include "cpu/int8_dynamic_linear/kernel.inl"
