#include "cpu/simd/avx2.h"

#include "cpu/scale_search/kernel.inl"
