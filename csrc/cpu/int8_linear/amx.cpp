#include "cpu/simd/amx.h"

#include "cpu/int8_linear/kernel.inl"
