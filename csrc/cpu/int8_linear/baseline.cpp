#include "cpu/simd/baseline.h"

#include "cpu/int8_linear/kernel.inl"
