#include "cpu/simd/baseline.h"

#include "cpu/linear/dot_baseline.h"

#include "cpu/int8_dynamic_linear/kernel.inl"
