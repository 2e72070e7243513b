#include "cpu/simd/avx512_vnni.h"

#include "cpu/int8_linear/kernel.inl"
