#include "cpu/simd/avx2.h"

#include "cpu/linear/codes_avx2.h"

#include "cpu/linear/dot_avx2.h"

#include "cpu/int4_linear/kernel.inl"
