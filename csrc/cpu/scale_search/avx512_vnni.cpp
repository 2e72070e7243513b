#include "cpu/simd/avx512_vnni.h"

#include "cpu/scale_search/kernel.inl"
