#include "cpu/simd/amx.h"

#include "cpu/linear/dot_avx512_vnni.h"

#include "cpu/int8_dynamic_linear/kernel.inl"
